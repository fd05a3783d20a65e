"""How often a seed looks at a picture: at which sizes, mirrored, in which tiles."""
