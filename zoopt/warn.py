"""Warnings that point at a line of the user's program, however deep in the package they arise."""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import warnings

import torch

_OWN = (
    *(os.path.dirname(str(path)) + os.sep for path in (__file__, torch.__file__)),
    contextlib.__file__,  # decorators
    functools.__file__,  # cached properties
)


def warn(message: str) -> None:
    """Warn at the line of the first caller outside zoopt and torch."""
    level, frame = 2, sys._getframe(1)
    while frame.f_back is not None and _is_own(frame.f_code.co_filename):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)


def _is_own(filename: str) -> bool:
    # "<string>", "<frozen ...>" and so on lie between callers and are never the program itself.
    return filename.startswith((*_OWN, "<"))
