"""The one error of this package."""


class ExportError(ValueError):
    """A checkpoint cannot be exported; the message quotes what was given and says what to do."""
