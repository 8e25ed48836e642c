"""Table schemas at the edges of a run, and the content key of a request."""
