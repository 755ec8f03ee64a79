"""Signals that wait until what must not be interrupted is done."""

from __future__ import annotations

import importlib
import signal
import threading
from types import FrameType
from typing import Any, ClassVar

#: Those that programs have handlers for. (Not every system has each.) Ctrl-C's, which most have, is
#: first.
_SIGNALS = [
    getattr(signal, name)
    for name in ("SIGINT", "SIGTERM", "SIGALRM", "SIGUSR1", "SIGUSR2")
    if hasattr(signal, name)
]
# The module behind `signal`, which also looks up a name for what it returns: that takes longer than
# all the rest. Other interpreters need not have it.
try:
    _module: Any = importlib.import_module("_signal")
except ImportError:
    _module = signal


class uninterrupted:
    """A context in which signals, Ctrl-C's among them, wait for its end: the outermost one's."""

    __slots__ = ("_caught", "_handlers")
    #: Whether signals wait for the end of one.
    _waiting: ClassVar[bool] = False

    def __enter__(self) -> None:
        self._caught: list[tuple[int, FrameType | None]] = []
        self._handlers: dict[int, Any] = {}
        if self._waiting or threading.current_thread() is not threading.main_thread():
            return  # in other threads Python handles no signals
        try:
            for number in _SIGNALS:
                handler = _module.getsignal(number)
                if callable(handler):
                    self._handlers[number] = handler
                    _module.signal(number, self._wait)
                    uninterrupted._waiting = True
        except BaseException:  # from the handler of a signal that does not wait yet
            self._end(list(self._handlers))
            raise

    def __exit__(self, *error: object) -> None:
        if self._handlers:
            self._end(list(self._handlers))

    def _end(self, waiting: list[int]) -> None:
        """Restore the handlers of the signals that wait, and call those of signals that have come.
        All of them, even where a handler raises an error, which goes on after that."""
        uninterrupted._waiting = False
        try:
            # Ctrl-C's last: from then on it interrupts.
            while waiting:
                _module.signal(waiting[-1], self._handlers[waiting[-1]])
                waiting.pop()
            while self._caught:
                self._handlers[self._caught[0][0]](*self._caught.pop(0))
        finally:
            if waiting or self._caught:
                self._end(waiting)

    def _wait(self, number: int, frame: FrameType | None) -> None:
        self._caught.append((number, frame))
