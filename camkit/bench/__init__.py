"""Seeds and refiners measured on held-out masks."""
