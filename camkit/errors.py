"""Errors a caller may want to catch; wrong arguments raise ValueError or TypeError."""


class CamkitError(Exception):
    """Base of camkit's own errors: something it would have to guess."""


class UnsupportedModelError(CamkitError):
    """The model has no attention camkit can watch, or does not support the requested method."""


class CaptureError(CamkitError):
    """A capture does not hold what was requested."""


class DataError(CamkitError):
    """A file cannot be used; the message says which and why."""
