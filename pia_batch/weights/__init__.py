"""Model weights: safetensors files on this machine, and an identity that results can record.

Does not import torch or diffusers: the driver needs the identity of models that only the actors load.
"""
