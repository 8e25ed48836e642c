"""Commit log and results: which requests are finished, and the tables that are published from it."""
