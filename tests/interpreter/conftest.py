"""Triton's interpreter, without work that it repeats."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import triton.language as tl
from triton.runtime import interpreter


def patched_once(patch: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Triton's function that puts its interpreter's operations in the place of the language's.

    Triton calls it for a kernel, and then undoes it, and at every call of a function within, where
    it finds nothing left to replace: half of the whole time. Here what a function can see of the
    language is patched when that is first called, and stays so.
    """
    done: set[int] = set()

    def once(function: Any) -> Any:
        known = function.__globals__.values()
        seen = {id(module) for module in known if module is tl or module is tl.core}
        if not seen <= done:
            patch(function)
            done.update(seen)
        return interpreter._LangPatchScope()  # of no changes, to be undone

    return once


@pytest.fixture(autouse=True, scope="session")
def _language_is_patched_once() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as change:
        change.setattr(interpreter, "_patch_lang", patched_once(interpreter._patch_lang))
        yield
