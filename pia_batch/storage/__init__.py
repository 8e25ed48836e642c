"""Object storage and URIs: reads bytes from folders, buckets and web servers, writes to folders and buckets."""
