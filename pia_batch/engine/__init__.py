"""PIA on one device: a batch of shots in, one clip for each shot out.

The engine does not know Ray, storage or manifests. Only this package imports torch, diffusers and transformers.
"""

from pia_batch.engine.engine import PiaEngine
from pia_batch.engine.shots import Clip, Shot

__all__ = ["Clip", "PiaEngine", "Shot"]
