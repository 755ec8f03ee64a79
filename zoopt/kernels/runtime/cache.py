"""The compiled kernels on disk: a damaged, full or unwritable cache never stops a step.

numba's own cache raises an error for a truncated file or a full disk, in every process, until
the file is deleted. Here each file has a checksum and is read whole or not at all. A kernel that
cannot be read or written is compiled again, with one warning that names the path.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, misc"
from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import os
import pickle
import uuid
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numba
from numba.core.caching import FunctionCache, NullCache
from numba.core.serialize import dumps

_SUFFIX = ".zoopt"
_DIGEST = 32
#: The directories in use, and what warnings have said.
_directories: set[Path] = set()
_warned: set[str] = set()


def keep(dispatcher: Any, vectors: Callable[[], int | None]) -> None:
    """Keep a function's machine code on disk.

    Args:
        vectors: returns the vectors' width in bits, which is part of the code's key.
    """
    try:
        dispatcher._cache = KernelCache(dispatcher.py_func, vectors)
    except (RuntimeError, OSError) as error:
        dispatcher._cache = _NoCache(error)


def directories() -> list[Path]:
    """Where compiled kernels are kept; empty if no such place can be written to."""
    return sorted(_directories)


@dataclasses.dataclass(frozen=True)
class Repaired:
    """What `repair` found: how many files are whole, which ones it removed, and which ones it could
    not read or remove."""

    whole: int
    removed: list[Path]
    left: list[Path]


def repair() -> Repaired:
    """Check every file of compiled kernels, and remove those that are damaged."""
    whole, removed, left = 0, list[Path](), list[Path]()
    for path in (file for folder in directories() for file in sorted(folder.glob(f"*{_SUFFIX}"))):
        try:
            _payload(path)
            whole += 1
        except ValueError:
            try:
                path.unlink()
                removed.append(path)
            except OSError:
                left.append(path)
        except OSError:
            left.append(path)
    return Repaired(whole, removed, left)


class KernelCache(FunctionCache):
    """numba's cache of a function, with checksummed files."""

    def __init__(self, function: Callable[..., Any], vectors: Callable[[], int | None]) -> None:
        super().__init__(function)
        base = Path(self._cache_path) / self._impl.filename_base
        self._cache_file = _Files(base, self._impl.locator.get_source_stamp())
        self._vectors = vectors
        _directories.add(Path(self._cache_path))

    def load_overload(self, sig, target_context):
        """The compiled function, or None."""
        try:
            return super().load_overload(sig, target_context)
        except Exception as error:
            _warn(self._cache_path, "read", error)
            return None

    def save_overload(self, sig, data):
        """Keep the compiled function, if possible."""
        try:
            super().save_overload(sig, data)
        except Exception as error:
            _warn(self._cache_path, "written", error)

    def _index_key(self, sig, codegen):
        return (*super()._index_key(sig, codegen), self._vectors())


class _NoCache(NullCache):
    """No cache: there is no place for files."""

    def __init__(self, error: Exception) -> None:
        self._error = error

    def load_overload(self, sig, target_context):
        place = os.environ.get("NUMBA_CACHE_DIR") or str(Path(__file__).parents[1])
        _warn(place, "written", self._error)
        return None


class _Files:
    """One file for each version of a function: a digest, and the pickled machine code."""

    def __init__(self, base: Path, stamp: object) -> None:
        self._base = base
        version = repr((numba.__version__, stamp, _sources())).encode()
        self._stamp = hashlib.blake2b(version, digest_size=6).hexdigest()

    def save(self, key: object, data: object) -> None:
        """Write the data, and remove what was compiled from older sources."""
        payload = dumps(data)
        path = self._path(key)
        with _whole_or_not(path) as partial:
            partial.write_bytes(_digest(payload) + payload)
        current = f"{self._base.name}.{self._stamp}."
        for other in path.parent.glob(f"{self._base.name}.*{_SUFFIX}"):
            if not other.name.startswith(current):
                other.unlink(missing_ok=True)

    def load(self, key: object) -> Any:
        """The data; None if there are none."""
        path = self._path(key)
        try:
            return pickle.loads(_payload(path))
        except FileNotFoundError:
            return None

    def flush(self) -> None:
        """Remove all files of the function."""
        for path in self._base.parent.glob(f"{self._base.name}.*{_SUFFIX}"):
            path.unlink(missing_ok=True)

    def _path(self, key: object) -> Path:
        name = hashlib.blake2b(repr(key).encode(), digest_size=12).hexdigest()
        return self._base.with_name(f"{self._base.name}.{self._stamp}.{name}{_SUFFIX}")


@functools.cache
def _sources() -> tuple[tuple[int, int], ...]:
    """Times and sizes of the kernels' sources. Compiled code contains functions of other files, and
    numba does not notice when those change."""
    found = (path.stat() for path in sorted(Path(__file__).parents[1].rglob("*.py")))
    return tuple((stat.st_mtime_ns, stat.st_size) for stat in found)


def _digest(payload: bytes) -> bytes:
    return hashlib.blake2b(payload, digest_size=_DIGEST).digest()


def _payload(path: Path) -> bytes:
    """A file without its digest.

    Raises:
        ValueError: it is damaged.
    """
    content = path.read_bytes()
    payload = content[_DIGEST:]
    if content[:_DIGEST] != _digest(payload):
        raise ValueError(f"{path} is damaged")
    return payload


@contextlib.contextmanager
def _whole_or_not(path: Path) -> Iterator[Path]:
    """A temporary file beside the path, which replaces it once it is written."""
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex[:16]}")
    try:
        yield partial
        os.replace(partial, path)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise


def _warn(place: str, what: str, error: Exception) -> None:
    """Warn, once for each directory. Where one cannot be written to, neither can the others, as a
    rule: that is said once."""
    said = {place, what} if what == "written" else {place}
    if said & _warned:
        return
    _warned.update(said)
    warnings.warn(
        f"zoopt's compiled kernels in {place} cannot be {what} ({error}); they are compiled anew, "
        f"which takes some 20 seconds a process. Let `zoopt doctor` repair them, or set "
        f"NUMBA_CACHE_DIR to a directory that can be written to",
        RuntimeWarning,
        stacklevel=2,
    )
