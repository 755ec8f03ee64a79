"""Updates that an error interrupts, and that are run again: nothing is written twice.

An update runs in a journal, which notes what has been done. Run again in the same journal, it skips
that. All of an update that writes is therefore in `once` or `pieces`. What is computed from values
that a later write changes is in `kept`, and so is a tensor of the update's own before `once` writes
to it. Outside a journal the three do nothing of their own.

Signals can interrupt a preparation between a write and its note, so that it is written again:
there, what is written must not depend on what was there before. In updates signals wait.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


class Journal:
    """What one update has done so far.

    Attributes:
        begun: whether it may have written.
    """

    def __init__(self) -> None:
        self.begun = False
        #: In the order in which the update comes to them: (result,) of what has been done, or else
        #: how many pieces have been. What lies within one comes after it until it has been done.
        self._entries: list[tuple[Any] | int] = []
        self._next = 0

    def run(self, update: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run the update, from its beginning or from where it was interrupted."""
        outer, _open.journal, self._next = _open.journal, self, 0
        try:
            return update(*args, **kwargs)
        finally:
            _open.journal = outer

    def result(self, writes: bool, part: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        """The result of a part of the update, which is run unless it has been done."""
        entries, at = self._entries, self._next
        after = self._next = at + 1
        if at == len(entries):
            entries.append(0)
        elif type(entries[at]) is tuple:
            done: T = entries[at][0]  # type: ignore[index]
            return done
        result = part(*args, **kwargs)
        if writes:
            self.begun = True
        entries[at] = (result,)
        if len(entries) != after:
            del entries[after:]
            self._next = after
        return result

    def remaining(self, items: Iterable[T]) -> Iterator[T]:
        """The items of a loop that have not been done."""
        entries, at = self._entries, self._next
        if at == len(entries):
            entries.append(0)
        for number, item in enumerate(items, 1):
            if number > entries[at]:  # type: ignore[operator]
                self._next = at + 1
                yield item
                self.begun = True
                entries[at] = number
                del entries[at + 1 :]
        self._next = at + 1


class _Open(threading.local):
    journal: Journal | None = None


_open = _Open()


def once(write: Callable[..., T], *args: Any, **kwargs: Any) -> T:
    """Do what writes: one operation that does all of it or nothing, or what consists of such ones,
    each in a `once` of its own."""
    journal = _open.journal
    if journal is None:
        return write(*args, **kwargs)
    return journal.result(True, write, *args, **kwargs)


def kept(compute: Callable[..., T], *args: Any, **kwargs: Any) -> T:
    """Compute what the rest of the update needs, and cannot compute again once it has written."""
    journal = _open.journal
    if journal is None:
        return compute(*args, **kwargs)
    return journal.result(False, compute, *args, **kwargs)


def pieces(items: Iterable[T]) -> Iterator[T]:
    """The items of a loop, each of whose rounds is as what `once` does. They are the same, in the
    same order, when the update is run again."""
    journal = _open.journal
    return iter(items) if journal is None else journal.remaining(items)
