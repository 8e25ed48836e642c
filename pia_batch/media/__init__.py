"""Image and animation bytes: fetches and decodes images, encodes and decodes clips."""
