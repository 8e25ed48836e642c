"""Manifest rows: find and read files, unify their schemas, cast columns and validate requests."""
