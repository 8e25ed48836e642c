"""Animate datasets of images and prompts with PIA, the Personalized Image Animator, at any scale.

A *manifest* has one *request* per row: an image, a prompt, and settings of its own.
Ray Data reads it and maps it across actors that each hold one PIA *engine*.
Every *animation* becomes one object and every request one *result* row, committed to a *journal* as it is made.
A *run* can be killed at any moment; the same command again finishes it, and nothing is lost, doubled or computed twice.

`pia_batch.config.RunConfig` says what to do, `pia_batch.pipeline.run` does it, and `pia_batch.engine.PiaEngine` is the
model by itself. They are imported from their modules, so that naming one does not load the others.
"""

__version__ = "0.1.0"
