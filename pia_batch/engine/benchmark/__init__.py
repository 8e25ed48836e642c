"""Benchmark of the engine against the ways to use PIA without it, and profiles of its calls."""
