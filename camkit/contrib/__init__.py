"""Methods without a default or a measured gain; names here may change in any version."""
