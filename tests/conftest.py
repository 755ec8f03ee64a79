"""Shared fixtures. Uninitialised tensors hold NaN in every test."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

# Read once, when torch is imported: waiting threads sleep, and leave the processor to others.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# numba's cache notices a change of a function's own file only, not of the files it calls into:
# a cache of its own for each version of the kernels. To be set before numba is imported.
_kernels = Path(__file__).parents[1] / "zoopt" / "kernels"
_version = hashlib.blake2b(digest_size=6)
for _source in sorted(_kernels.rglob("*.py")):
    _version.update(_source.read_bytes())
os.environ.setdefault(
    "NUMBA_CACHE_DIR", f"{tempfile.gettempdir()}/zoopt-numba-{_version.hexdigest()}"
)

# Triton keeps what it compiles in the home directory.
if not os.access(Path.home(), os.W_OK):
    os.environ.setdefault("TRITON_HOME", f"{tempfile.gettempdir()}/zoopt-triton")

import hypothesis  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

# The same examples in every run, however long they take: the processor may be busy otherwise.
# `pytest --hypothesis-profile=default` looks for others.
hypothesis.settings.register_profile(
    "repeatable",
    deadline=None,
    derandomize=True,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("repeatable")

# The interpreter must be chosen before triton is imported: its tests have their own process.
collect_ignore = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["interpreter"]
if not torch.cuda.is_available():
    collect_ignore.append("test_gpu.py")

#: Files whose single tests take longest. They go first, so that no worker ends with one of them.
LONG_FILES = (
    *("test_triton.py", "test_fused_backward.py", "test_doctor_gpu.py"),
    *("test_wheel.py", "test_examples.py", "test_memory.py"),
)


def turn(path: Path) -> int:
    """When a file's tests are run. Those in several processes come after those that compile the
    kernels: each process would compile them for itself. Many short tests are the last."""
    if path.name in LONG_FILES:
        return 0
    if path.parent.name == "launch":
        return 3
    return 2 if path.name.startswith(("test_distributed", "test_seeds")) else 1


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """By turns; otherwise tests keep their order."""
    items.sort(key=lambda item: turn(item.path))


@pytest.fixture(autouse=True)
def _poisoned_memory() -> Iterator[None]:
    """torch.empty and its kin are filled with NaN (the largest value for integers)."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(20261122)
