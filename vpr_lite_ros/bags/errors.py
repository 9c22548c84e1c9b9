"""The one exception of this package."""


class SourceError(ValueError):
    """Something recorded cannot be used; the message says what, and what to pass instead."""
