"""The names of grad-cam's ``utils``: targets, pictures and reshape functions."""
