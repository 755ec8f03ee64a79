"""Compiled kernels on disk: damaged, full and unwritable caches, and the width of vectors."""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import llvmlite.binding as llvm
import numba
import numpy as np
import pytest

from zoopt.doctor import diagnosis
from zoopt.kernels.runtime import cache, width

ROOT = Path(__file__).parents[1]
SOURCE = """
import numpy as np
from zoopt.kernels.runtime.intrinsics import jit

@jit
def double(x):
    for j in range(len(x)):
        x[j] = np.float32(x[j] + x[j])

@jit
def negate(x):
    for j in range(len(x)):
        x[j] = -x[j]
"""
NAMES = (f"kept_{i}" for i in itertools.count())


@pytest.fixture
def kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], ModuleType]]:
    """Makes a module of two kernels, as a new process would, whose cache is in tmp_path."""
    width.preferred()  # Where it is measured, the loop that it takes is kept elsewhere.
    monkeypatch.setattr("numba.core.config.CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(cache, "_directories", set())
    path = tmp_path / "kept.py"
    path.write_text(SOURCE)

    def load() -> ModuleType:
        monkeypatch.setattr(cache, "_warned", set())
        spec = importlib.util.spec_from_file_location(next(NAMES), path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        # Types that numba pickles are looked up by their module's name.
        monkeypatch.setitem(sys.modules, spec.name, module)
        spec.loader.exec_module(module)
        return module

    return load


def run(module: ModuleType) -> int:
    """Use both kernels; how many of them came from the disk."""
    x = np.arange(100, dtype=np.float32)
    module.double(x)
    module.negate(x)
    assert (x == -2.0 * np.arange(100)).all()
    return sum(sum(kernel.stats.cache_hits.values()) for kernel in (module.double, module.negate))


def files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.zoopt"))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:100])


def zero(path: Path) -> None:
    """What is left after a power loss: the length is right."""
    path.write_bytes(bytes(path.stat().st_size))


def zero_the_end(path: Path) -> None:
    """The pickle is whole, and the machine code in it is not."""
    content = path.read_bytes()
    path.write_bytes(content[:-2000] + bytes(2000))


def empty(path: Path) -> None:
    path.write_bytes(b"")


def replace(path: Path) -> None:
    """Whole, but of something else."""
    payload = pickle.dumps(("not", "code"))
    path.write_bytes(cache._digest(payload) + payload)


def block(path: Path) -> None:
    path.unlink()
    path.mkdir()


def test_code_is_kept(kernels: Callable[[], ModuleType], tmp_path: Path) -> None:
    assert run(kernels()) == 0
    assert len(files(tmp_path)) == 2
    assert run(kernels()) == 2


@pytest.mark.parametrize("damage", [truncate, zero, zero_the_end, empty, replace, block])
def test_a_damaged_file_is_compiled_anew(
    kernels: Callable[[], ModuleType], tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    run(kernels())
    for path in files(tmp_path):
        damage(path)
    with pytest.warns(RuntimeWarning, match=str(tmp_path)) as caught:
        assert run(kernels()) == 0
    assert len(caught) == 1
    expected = contextlib.nullcontext() if damage is not block else pytest.warns(RuntimeWarning)
    with expected:
        assert run(kernels()) == (0 if damage is block else 2)


def test_a_change_of_any_kernels_source_is_seen(
    kernels: Callable[[], ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Code has that of the functions in it which it calls."""
    run(kernels())
    before = files(tmp_path)
    monkeypatch.setattr(cache, "_sources", lambda: ((0, 0),))
    assert run(kernels()) == 0
    assert len(files(tmp_path)) == len(before)
    assert not set(files(tmp_path)) & set(before)


def test_repair_removes_what_is_damaged(kernels: Callable[[], ModuleType], tmp_path: Path) -> None:
    run(kernels())
    damaged, whole = files(tmp_path)
    zero(damaged)
    assert cache.repair() == cache.Repaired(1, [damaged], [])
    assert files(tmp_path) == [whole]
    block(whole)
    assert cache.repair() == cache.Repaired(0, [], [whole])


def test_the_doctor_says_what_it_has_removed(
    kernels: Callable[[], ModuleType], tmp_path: Path
) -> None:
    run(kernels())
    damaged = files(tmp_path)[0]
    truncate(damaged)
    found = diagnosis.compiled_kernels()
    assert found[str(damaged)] == "was damaged; removed"
    assert found[str(damaged.parent)] == "kept here"
    assert not damaged.exists()


def process(folder: Path, before: str, **environment: str) -> str:
    """What a new process that runs both kernels says of its cache."""
    (folder / "kept.py").write_text(SOURCE)
    script = (
        f"import sys, numpy as np; sys.path.insert(0, {str(folder)!r}); import kept\n{before}\n"
        "x = np.ones(5, np.float32); kept.double(x); kept.negate(x); assert (x == -2).all()"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stderr


def test_a_full_disk_is_said_once(tmp_path: Path) -> None:
    """No file may grow: every write fails, after its file has been made. Kernels are kept in
    several directories; that which measures the width has been run, as on some processors."""
    limit = (
        "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (64, 64))\n"
        "from zoopt.kernels.runtime import width; width.measured(256)"
    )
    said = process(tmp_path, limit, NUMBA_CACHE_DIR=str(tmp_path / "cache"))
    assert said.count("cannot be written") == 1
    assert str(tmp_path / "cache") in said
    assert not any(path.is_file() for path in (tmp_path / "cache").rglob("*"))


def test_no_place_for_a_cache_is_said_once(tmp_path: Path) -> None:
    only = {"NUMBA_CACHE_LOCATOR_CLASSES": "UserProvidedCacheLocator"}
    said = process(tmp_path, "", NUMBA_CACHE_DIR="/proc/nowhere", **only)
    assert said.count("cannot be written") == 1
    assert "/proc/nowhere" in said


FEATURES = "+avx512f,+avx512vl,+avx512bw,+avx512dq,+avx512cd,+avx2,+avx,+fma"


@pytest.mark.parametrize(
    ("cpu", "expected"),
    [("emeraldrapids", True), ("skylake-avx512", True), ("znver4", False), ("znver5", False)],
)
def test_processors_that_llvm_gives_half_their_width(cpu: str, expected: bool) -> None:
    assert width.halved(cpu, FEATURES) == expected


@pytest.mark.parametrize(("own", "expected"), [(256, False), (512, True)])
def test_the_attribute_sets_the_width(
    own: int, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    wide = width._SUM.replace('"="0"', f'"="0" "prefer-vector-width"="{own}"')
    monkeypatch.setattr(width, "_SUM", wide)
    for cpu in ("emeraldrapids", "znver5"):
        assert width.halved(cpu, FEATURES) != expected


def halfwidth(x):
    for j in range(len(x)):
        x[j] = np.float32(x[j] + x[j])


@pytest.mark.parametrize("own", [256, 512])
def test_kernels_carry_a_width_and_others_do_not(own: int) -> None:
    ours = numba.njit(pipeline_class=width._pipeline(own))(halfwidth)
    theirs = numba.njit(halfwidth)
    for function in (ours, theirs):
        function(np.ones(5, np.float32))
    [text], [other] = ours.inspect_llvm().values(), theirs.inspect_llvm().values()
    assert f'"prefer-vector-width"="{own}"' in text
    assert "prefer-vector-width" not in other


@pytest.mark.parametrize(
    ("times", "expected"), [({512: 1.0, 256: 1.5}, 512), ({512: 1.5, 256: 1.0}, 256)]
)
def test_the_better_width_is_taken_where_llvm_takes_half(
    times: dict[int, float], expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(width, "halved", lambda cpu, features: True)
    monkeypatch.setattr(width, "_has_512", lambda features: True)
    monkeypatch.setattr(width, "measured", times.get)
    assert width.preferred.__wrapped__() == expected


def test_measured_widths_are_those_of_the_machine_code() -> None:
    """The loop that decides is vectorised, 512 bits at a time where the machine has them."""
    wide = dict[int, int]()
    for own in (256, 512):
        assert width.measured(own) > 0.0
        loop = numba.njit(pipeline_class=width._pipeline(own), error_model="numpy")(width._loop)
        loop(np.zeros(64, np.float32), np.zeros(64, np.uint32))
        [text] = loop.inspect_asm().values()
        wide[own] = text.count("zmm")
    if llvm.get_host_cpu_features().get("avx512f"):
        # Vectors are reordered 512 bits at a time in either.
        assert wide[512] > 2 * wide[256]
    else:
        assert wide == {256: 0, 512: 0}


def test_this_machine_keeps_the_width_it_has() -> None:
    """On a machine that LLVM does not halve, code is as without the attribute."""
    _, cpu, features = width.cpu_target.target_context.codegen().magic_tuple()
    halved = width._has_512(features) and width.halved(cpu, features)
    assert (width.preferred() is None) == (not halved)
