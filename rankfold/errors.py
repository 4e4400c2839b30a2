"""The one kind of error that is the user's to mend."""

from __future__ import annotations


class InputError(ValueError):
    """What was given cannot be used: the message says what must hold, what came, where, and what to do."""
