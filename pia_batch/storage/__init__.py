"""Object storage and URIs: how bytes are read from and written to folders, buckets and web servers."""
