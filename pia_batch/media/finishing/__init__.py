"""Finishing on the CPU: changes of frames between the engine and the file, each off by default. No torch, no Ray."""
