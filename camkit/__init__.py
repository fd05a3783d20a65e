"""Any pretrained Vision Transformer and image-level labels become pixel masks to trust."""
