"""Ray Data chain: read, validate, fetch, generate and commit."""
