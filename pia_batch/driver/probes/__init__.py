"""Programs that `doctor` runs by `python -m`, each in a process of its own; each prints one JSON document."""
