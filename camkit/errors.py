"""What a caller may want to catch; wrong arguments are plain ValueError and TypeError."""


class CamkitError(Exception):
    """Anything camkit refuses to guess about."""


class UnsupportedModelError(CamkitError):
    """The model has no attention that can be watched, or no rule that fits what was asked."""


class CaptureError(CamkitError):
    """Something was asked of a capture that it did not see."""


class DataError(CamkitError):
    """A file cannot be used; the message names it."""
