"""Class maps from attention: its class rows, its gradients, its products over blocks."""
