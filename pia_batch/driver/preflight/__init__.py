"""Preflight checks of `doctor`: this machine, the weights, the manifest, the store and Ray, each with its remedy."""

from pia_batch.driver.preflight.examination import examine
from pia_batch.driver.preflight.finding import Finding, State

__all__ = ["Finding", "State", "examine"]
