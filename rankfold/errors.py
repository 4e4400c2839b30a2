"""The one kind of error that is the user's to mend."""

from __future__ import annotations


class InputError(ValueError):
    """The input cannot be used: the message says what must hold, what was given, where, and what to do."""
