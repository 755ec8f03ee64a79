"""The one error a user of the example should ever meet."""

from __future__ import annotations


class InputError(Exception):
    """Bad input; the message is one line that says what is wrong and what to do about it."""
