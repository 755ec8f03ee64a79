"""The models and sizes that the sections of `zoopt doctor --gpu` measure."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Setting:
    """A batch of `batch` sequences of `seq` tokens, with weights of a dtype."""

    batch: int
    seq: int
    dtype: str

    @property
    def name(self) -> str:
        """The name in rows and bars."""
        return f"{self.batch} x {self.seq} {self.dtype}"


@dataclasses.dataclass(frozen=True)
class Scale:
    """What is measured.

    Attributes:
        name: its name on the command line.
        forward_model, settings: for zeroth-order steps. The limits depend on the settings' order:
            much work per weight in bfloat16, little work in bfloat16, float32.
        large_model, large_seq: for MeZO on a model whose weights alone fill a GPU; one sequence.
        model, seq: for first-order steps, one sequence in bfloat16.
        rank: the rank of projections and low-rank directions.
        numel: elements of a tensor for kernels.
        repeats: rounds.
        tests: the checkout's tests, as arguments of pytest.
    """

    name: str
    forward_model: str
    settings: tuple[Setting, Setting, Setting]
    large_model: str
    large_seq: int
    model: str
    seq: int
    rank: int
    numel: int
    repeats: int
    tests: tuple[str, ...]


FULL = Scale(
    name="full",
    forward_model="llama-3.2-1b",
    settings=(
        Setting(16, 256, "bfloat16"),
        Setting(2, 128, "bfloat16"),
        Setting(8, 128, "float32"),
    ),
    large_model="opt-13b",
    large_seq=400,
    model="llama-7b",
    seq=512,
    rank=128,
    numel=1 << 27,
    repeats=7,
    tests=("tests/test_gpu.py",),
)
TINY = Scale(
    name="tiny",
    forward_model="tiny",
    settings=(Setting(4, 8, "bfloat16"), Setting(1, 4, "bfloat16"), Setting(2, 4, "float32")),
    large_model="tiny",
    large_seq=8,
    model="tiny",
    seq=8,
    rank=4,
    numel=1 << 12,
    repeats=1,
    tests=("tests/test_devices.py",),
)
SCALES = {scale.name: scale for scale in (FULL, TINY)}
