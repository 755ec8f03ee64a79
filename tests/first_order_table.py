"""The first-order optimizers under contract: one row a class and variant."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import zoopt
from tests.reference.adafactor_float64 import GaLoreAdafactor64
from tests.reference.apollo_float64 import Apollo64
from tests.reference.fira_float64 import Fira64
from tests.reference.frugal_float64 import Frugal64
from tests.reference.galore_float64 import GaLore64
from tests.reference.ldadam_float64 import LDAdam64
from tests.reference.qgalore_float64 import QGaLore64
from tests.reference.sm3_float64 import SM364
from tests.reference.sparse_delta_float64 import SparseDelta64

#: shape, bytes of an element -> bytes of state of one parameter.
StateBytes = Callable[[tuple[int, ...], int], int]


@dataclasses.dataclass(frozen=True)
class Row:
    """A variant of an optimizer.

    Attributes:
        cls, options: how it is built.
        oracle: its float64 transcription, with `step(theta, grads, bases)` in place, or None where
            a test of its own holds it to one.
        state_bytes: what it keeps.
        falls: to what fraction 200 steps take the loss.
        tolerance: against the oracle, in float64, relative to 1 + max |theta|.
        oracle_options: as the oracle calls them, where names or values differ.
        matrices: whether the oracle gets tensors of more than two axes as matrices.
        sparse: whether it takes sparse gradients.
    """

    name: str
    cls: type[torch.optim.Optimizer]
    options: dict[str, Any]
    oracle: type[Any] | None
    state_bytes: StateBytes
    falls: float = 0.5
    tolerance: float = 1e-9
    oracle_options: dict[str, Any] = dataclasses.field(default_factory=dict)
    matrices: bool = True
    sparse: bool = False

    def build(self, model: nn.Module, **options: Any) -> Any:
        return self.cls(model.named_parameters(), **{**self.options, **options})  # type: ignore[call-arg]

    def build_oracle(self) -> Any:
        assert self.oracle is not None
        fields = {field.name for field in dataclasses.fields(self.oracle) if field.init}
        options = {**self.options, **self.oracle_options}
        return self.oracle(**{k: v for k, v in options.items() if k in fields})

    def __str__(self) -> str:
        return self.name


def row(
    name: str, cls: type[Any], oracle: type[Any] | None, kept: StateBytes, **options: Any
) -> Row:
    fields = {field.name for field in dataclasses.fields(Row)} - {"name", "cls", "options"}
    extra = {key: options.pop(key) for key in list(options) if key in fields}
    return Row(
        f"{cls.__name__} {name}".strip(),
        cls,
        {"lr": 1e-2, "seed": 7, **options},
        oracle,
        kept,
        **extra,
    )


def wide(itemsize: int) -> int:
    """Bytes of an accumulator."""
    return 8 if itemsize == 8 else 4


def coded(numel: int, state_dtype: str, itemsize: int) -> int:
    """Bytes of one moment."""
    if state_dtype == "bfloat16":
        return 2 * numel
    if state_dtype == "float32" or numel < 4096:
        return wide(itemsize) * numel
    block, per_byte = {"int8": (256, 1), "int4": (128, 2)}[state_dtype]
    return math.ceil(numel / per_byte) + 4 * math.ceil(numel / block)


def whole(moments: int = 2, state_dtype: str = "float32") -> StateBytes:
    """Moments of the parameter's size, and the step."""

    def state_bytes(shape: tuple[int, ...], itemsize: int) -> int:
        return 8 + moments * coded(math.prod(shape), state_dtype, itemsize)

    return state_bytes


def projected(
    rank: int,
    proj_type: str = "std",
    moments: int = 2,
    state_dtype: str = "float32",
    bases: bool = True,
    extra: int = 0,
    narrow: bool = True,
) -> StateBytes:
    """Of a matrix: bases, moments in the subspace, the step; `extra` numbers of the accumulator.

    Bases have the weights' size a number, unless they are not `narrow`.
    """

    def state_bytes(shape: tuple[int, ...], itemsize: int) -> int:
        if len(shape) < 2:
            return whole(moments, state_dtype)(shape, itemsize)
        m, n = shape[0], math.prod(shape[1:])
        r = min(rank, m, n)
        kept, projected_side = {
            "std": (max(m, n), min(m, n)),
            "reverse_std": (min(m, n), max(m, n)),
            "right": (m, n),
            "left": (n, m),
            "full": (r, m + n),
        }[proj_type]
        number = itemsize if narrow else wide(itemsize)
        basis = number * projected_side * r if bases else 0
        return 8 + basis + extra * wide(itemsize) + moments * coded(kept * r, state_dtype, itemsize)

    return state_bytes


def galore(name: str, **options: Any) -> Row:
    kept = projected(
        options["rank"],
        options.get("proj_type", "std"),
        state_dtype=options.get("state_dtype", "float32"),
        bases=options.get("projector") != "random",
    )
    oracle = None if "state_dtype" in options else GaLore64
    base = {"update_proj_gap": 5, "scale": 1.0, "eps": 1e-6}
    return row(name, zoopt.GaLoreAdamW, oracle, kept, **{**base, **options})


def residual(name: str, cls: type[Any], oracle: type[Any] | None, **options: Any) -> Row:
    """Of the methods that keep their last norm."""
    kept = projected(
        options.get("rank", 1),
        options.get("proj_type", "std"),
        state_dtype=options.get("state_dtype", "float32"),
        bases=options.get("projector", "random" if oracle is not Fira64 else "warm") != "random",
        extra=1,
    )
    oracle = None if "state_dtype" in options else oracle
    return row(name, cls, oracle, kept, **{"update_proj_gap": 5, "scale": 1.0, **options})


def qgalore(name: str, basis_dtype: str = "int4", **options: Any) -> Row:
    """Moments in int8 only where asked for; two numbers for the lazy refresh."""
    rank, state_dtype = options["rank"], options.get("state_dtype", "float32")
    lazy = options.get("cos_threshold", 0.4) is not None

    def kept(shape: tuple[int, ...], itemsize: int) -> int:
        kept = basis_dtype == "float32"
        full = projected(rank, state_dtype=state_dtype, bases=kept, narrow=False)
        if len(shape) < 2:
            return full(shape, itemsize)
        m, n = shape[0], math.prod(shape[1:])
        numel = min(m, n) * min(rank, m, n)
        codes = math.ceil(numel / 2) + 4 * math.ceil(numel / 256)
        return full(shape, itemsize) + 8 * lazy + codes * (basis_dtype == "int4")

    oracle = QGaLore64 if options.get("projector") == "svd" else None
    base = {"state_dtype": "float32", "basis_dtype": basis_dtype, "update_proj_gap": 5}
    return row(name, zoopt.QGaLoreAdamW, oracle, kept, **{**base, "scale": 1.0, **options})


def ldadam(name: str, **options: Any) -> Row:
    low_rank = projected(
        options["rank"],
        options.get("proj_type", "std"),
        state_dtype=options.get("state_dtype", "float32"),
        narrow=False,
    )

    def kept(shape: tuple[int, ...], itemsize: int) -> int:
        error = len(shape) > 1 and options.get("error_feedback", True)
        return low_rank(shape, itemsize) + (itemsize * math.prod(shape) if error else 0)

    oracle = None if "state_dtype" in options else LDAdam64
    return row(name, zoopt.LDAdamW, oracle, kept, **options)


def gradnormlorp(name: str, **options: Any) -> Row:
    """GaLore between two bases. Between them a gradient is nearly diagonal, as of "two-sided"."""
    state_dtype = options.get("state_dtype", "float32")
    kept = projected(options["rank"], "full", state_dtype=state_dtype)
    oracle = None if "state_dtype" in options else GaLore64
    base = {"update_proj_gap": 5, "eps": 1e-3}
    return row(name, zoopt.GradNormLoRP, oracle, kept, **{**base, **options})


def frugal(name: str, **options: Any) -> Row:
    """A density of 1/4, and its basis where it is not columns."""
    density, projector = options.get("density", 0.25), options.get("projector", "columns")
    moments = 2 if options.get("rule", "adam") == "adam" else 1
    state_dtype = options.get("state_dtype", "float32")

    def kept(shape: tuple[int, ...], itemsize: int) -> int:
        if len(shape) < 2 or density == 1.0:
            return whole(moments, state_dtype)(shape, itemsize)
        m, n = shape[0], math.prod(shape[1:])
        side, channels = (n, m) if m >= n or options.get("proj_type") == "right" else (m, n)
        r = max(1, round(density * side))
        basis = 0 if projector == "columns" else itemsize * side * r
        return 8 + basis + moments * coded(channels * r, state_dtype, itemsize)

    oracle = None if "state_dtype" in options else Frugal64
    base = {"lr": 2e-3, "update_proj_gap": 5}
    return row(name, zoopt.Frugal, oracle, kept, **{**base, **options})


def sm3(name: str, **options: Any) -> Row:
    """A number an index of each axis; the step where weights are rounded stochastically."""

    def kept(shape: tuple[int, ...], itemsize: int) -> int:
        buffer = math.prod(shape) if options.get("momentum") else 0
        step = 8 if itemsize == 2 and options.get("rounding") != "nearest" else 0
        return wide(itemsize) * (sum(shape) + buffer) + step

    return row(name, zoopt.SM3, SM364, kept, matrices=False, sparse=True, **options)


def sparse_delta(name: str, **options: Any) -> Row:
    """Of an active entry index, base, moments and age; candidates, or rows and columns."""

    def kept(shape: tuple[int, ...], itemsize: int) -> int:
        numel, number = math.prod(shape), wide(itemsize)
        k = max(1, int(options["density"] * numel))
        others = min(max(k // 4 - 1, round(0.4 * k)), numel - k)
        more = others * (4 + 2 * (8 if itemsize == 8 else 2))
        if options.get("growth") == "momentum":
            m = shape[0] if len(shape) > 1 else 1
            more = number * (m + numel // m) * (others > 0)
        return 8 + k * (4 + itemsize + 2 * number + 2) + more

    base = {"update_gap": 4, "window": 3, "drop_fraction": 0.4}
    options = {**base, **options}
    return row(name, zoopt.SparseDeltaAdamW, SparseDelta64, kept, **options)


def adafactor(name: str, **options: Any) -> Row:
    low_rank, rank = projected(options["rank"], options.get("proj_type", "std"), 0), options["rank"]
    average = options.get("beta1") is not None
    state_dtype = options.get("state_dtype", "float32")

    def kept(shape: tuple[int, ...], itemsize: int) -> int:
        if len(shape) < 2:
            return whole(1 + average)(shape, itemsize)
        m, n = shape[0], math.prod(shape[1:])
        r = min(rank, m, n)
        channels = r if options.get("proj_type") == "full" else max(m, n)
        moments = wide(itemsize) * (channels + r)
        moments += average * coded(channels * r, state_dtype, itemsize)
        return low_rank(shape, itemsize) + moments

    oracle = None if "state_dtype" in options else GaLoreAdafactor64
    base = {"update_proj_gap": 5, "scale": 1.0}
    return row(name, zoopt.GaLoreAdafactor, oracle, kept, **{**base, **options})


ROWS = [
    row("", zoopt.AdamW, GaLore64, whole(), oracle_options={"weight_decay": 1e-2}),
    row("decay", zoopt.AdamW, GaLore64, whole(), weight_decay=0.1, betas=(0.8, 0.9)),
    row("ascent", zoopt.AdamW, GaLore64, whole(), weight_decay=0.0, maximize=True),
    row("bfloat16", zoopt.AdamW, None, whole(2, "bfloat16"), state_dtype="bfloat16"),
    row("int8", zoopt.AdamW, None, whole(2, "int8"), state_dtype="int8"),
    row("int4", zoopt.AdamW, None, whole(2, "int4"), state_dtype="int4"),
    galore("warm", rank=8),
    galore("svd", rank=8, projector="svd", weight_decay=0.1),
    galore("gram", rank=8, projector="gram", stagger=False),
    galore("randomized", rank=8, projector="randomized"),
    galore("random", rank=32, projector="random"),
    galore("full rank", rank=1000),
    galore("reverse", rank=8, proj_type="reverse_std"),
    galore("left", rank=8, proj_type="left"),
    galore("right", rank=8, proj_type="right"),
    # Between its bases a gradient is nearly diagonal: Adam makes steps of its tiny entries.
    galore("two-sided", rank=32, proj_type="full", eps=1e-3),
    galore("released", rank=8, projector="svd", stagger=False, decay="after", eps_correction=False),
    galore("int8", rank=48, state_dtype="int8"),
    galore("int4", rank=48, state_dtype="int4", state_rounding="nearest"),
    residual("", zoopt.Apollo, Apollo64, rank=8),
    residual("unlimited", zoopt.Apollo, Apollo64, rank=8, norm_growth_limit=None, scale=0.5),
    residual("svd", zoopt.Apollo, Apollo64, rank=8, projector="svd", weight_decay=0.1),
    residual("warm", zoopt.Apollo, Apollo64, rank=8, projector="warm", stagger=False),
    residual("int8", zoopt.Apollo, Apollo64, rank=48, state_dtype="int8"),
    residual("", zoopt.ApolloMini, Apollo64, oracle_options={"mini": True}),
    residual("ascent", zoopt.ApolloMini, Apollo64, oracle_options={"mini": True}, maximize=True),
    residual("", zoopt.Fira, Fira64, rank=8),
    residual("svd", zoopt.Fira, Fira64, rank=8, projector="svd", scale=0.25, weight_decay=0.1),
    residual("unlimited", zoopt.Fira, Fira64, rank=8, norm_growth_limit=None),
    # Next to nothing of the last weight's gradient is outside: a norm that is a small difference.
    residual("reverse", zoopt.Fira, Fira64, rank=8, proj_type="reverse_std", tolerance=1e-7),
    residual("ascent", zoopt.Fira, Fira64, rank=8, maximize=True),
    residual("int8", zoopt.Fira, Fira64, rank=48, state_dtype="int8"),
    qgalore("", rank=8, projector="svd", weight_decay=0.1),
    qgalore("lazy", rank=8, projector="svd", update_proj_gap=2, queue_size=1, cos_threshold=0.1),
    qgalore("float32 basis", rank=8, projector="svd", basis_dtype="float32", cos_threshold=None),
    qgalore("int8", rank=48, state_dtype="int8"),
    qgalore("gram", rank=8, projector="gram", stagger=False),
    ldadam("", rank=8),
    ldadam("decay", rank=8, weight_decay=0.1, proj_type="left", rho=0.5),
    ldadam("without feedback", rank=8, error_feedback=False),
    # Rank 60 of a gradient of rank 25. Power iteration leaves some 1e-10 of the live directions in
    # the others, which the default eps of 1e-8 does not hold back.
    ldadam("full rank", rank=1000, eps=1e-4),
    ldadam("int8", rank=48, state_dtype="int8"),
    gradnormlorp("", rank=32),
    gradnormlorp("ascent", rank=32, weight_decay=0.1, maximize=True),
    gradnormlorp("int8", rank=80, state_dtype="int8"),
    frugal(""),
    frugal("columns", proj_type="right", weight_decay=0.1, stagger=False),
    frugal("svd", projector="svd", sign_lr_scale=0.1),
    frugal("orthogonal", projector="orthogonal"),
    frugal("lion", rule="lion"),
    frugal("momentum", rule="momentum", momentum=0.5),
    frugal("full", density=1.0, lr=1e-2),
    frugal("ascent", maximize=True),
    frugal("int8", density=0.9, state_dtype="int8"),
    sm3("", lr=0.1),
    sm3("momentum", lr=0.1, momentum=0.9, weight_decay=0.1),
    sm3("average", beta=0.9, eps=1e-3, rounding="nearest"),
    sm3("ascent", lr=0.1, maximize=True),
    sparse_delta("", density=0.3),
    sparse_delta("few", density=0.05, weight_decay=0.1, total_steps=10, falls=0.8),
    sparse_delta("momentum", density=0.3, growth="momentum"),
    sparse_delta("ascent", density=0.3, maximize=True),
    sparse_delta("all", density=1.0),
    adafactor("", rank=8),
    adafactor("average", rank=8, beta1=0.9, weight_decay=0.1, beta2_decay=-0.5, projector="svd"),
    adafactor("relative", rank=8, relative_step=True, eps=(1e-6, 1e-2), d=2.0, lr=1e-1),
    adafactor("two-sided", rank=8, proj_type="full", lr=3e-2),
    adafactor("ascent", rank=1000, maximize=True),
    adafactor("int8", rank=48, beta1=0.9, state_dtype="int8"),
]


def net(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """Wide and tall matrices, a convolution's kernel and vectors: some 11k weights."""
    generator = torch.Generator().manual_seed(1)
    model = nn.Sequential(
        nn.Conv1d(2, 6, 3),
        nn.Flatten(),
        nn.Linear(60, 96),
        nn.Tanh(),
        nn.LayerNorm(96),
        nn.Linear(96, 48),
        nn.Tanh(),
        nn.Linear(48, 4),
    )
    with torch.no_grad():
        for param in model.parameters():
            scale = 1.0 if param.dim() < 2 else 1.0 / math.sqrt(math.prod(param.shape[1:]))
            param.copy_(torch.randn(param.shape, generator=generator) * scale)
    return model.to(dtype)


def batch(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(64, 2, 12, generator=generator)
    y = torch.stack((x.sum((1, 2)).tanh(), x[:, 0, 0] * x[:, 1, 1], x[:, 0, 3], x[:, 1].amax(1)), 1)
    return x.to(dtype), y.to(dtype)


def backward(model: nn.Module) -> torch.Tensor:
    """The loss, with its gradients in place."""
    x, y = batch(next(model.parameters()).dtype)
    for param in model.parameters():
        param.grad = None
    loss = (model(x) - y).double().pow(2).mean()
    loss.backward()
    return loss.detach()
