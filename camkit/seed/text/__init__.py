"""Class maps from a space that pictures share with words."""
