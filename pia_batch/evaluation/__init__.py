"""Evaluation of committed animations: measures of each, selection by them, and comparison of two outputs."""
