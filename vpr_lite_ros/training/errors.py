"""What can be wrong with training data and recipes."""

from __future__ import annotations


class TrainingError(ValueError):
    """Training data or settings that do not fit; the message names the entry and the value."""
