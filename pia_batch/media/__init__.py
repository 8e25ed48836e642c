"""Image and animation bytes: fetch and decode images, encode and decode clips."""
