"""Tensor functions that know nothing of models; each is plain torch or has a plain twin."""
