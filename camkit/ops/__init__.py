"""Functions of tensors, independent of models; compiled ones have a plain torch version."""
