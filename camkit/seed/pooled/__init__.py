"""Class maps that share a pooled class score out among the patches it came from."""
