"""Class maps from patch tokens: their gradients, their likeness, their own class scores."""
