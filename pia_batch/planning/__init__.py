"""Plan of a run: the manifest's requests less those that the journal has finished."""
