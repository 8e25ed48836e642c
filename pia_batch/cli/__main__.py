"""Entry point of `python -m pia_batch.cli`."""

from pia_batch.cli import main

main()
