"""Datasets in and out: manifests made of what people have, and outputs in the formats that others read."""
