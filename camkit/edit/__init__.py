"""What changes a forward from the inside."""
