"""Time of a GaLore step against its floor and against the published code; cost of a new basis.

Steps: of the matrices of one shape in a LLaMA (a layer has 4 of attention d x d; gate and up h x d;
down d x h), as one optimizer holds those of all layers, or of as many as fit in 2 GB; per layer; at
the GaLore paper's rank. Methods:

  floor      the least that a step must do: G Q, theta + R Q^T in place, both in the weights' dtype,
             and one pass over both moments in float32
  zoopt      zoopt.GaLoreAdamW, between two refreshes
  nearest    in bfloat16: the same, its weights rounded to nearest, as published, and not
             stochastically; the floor rounds them to nearest too
  published  galore_torch 1.0's AdamW, between two refreshes

All are timed in turn, round by round; a ratio is the median of the rounds' own. A refresh (warm
orthogonal iteration; torch.linalg.svd in the published code) is timed apart, once, and a T-th of it
is added to a step: T = 200, as published. `layer` is the sum over a layer's shapes.

Refresh: a chain of drifting gradients, 2048 x 2048, r = 128. They are made up: G = S + noise, with
S of rank 512, singular values 1/k, turning a little from one refresh to the next, and white noise
of S's own norm, drawn afresh for each "minibatch". A basis is made of one minibatch's G and judged
by the share of ANOTHER minibatch's energy that it captures, ||G' P||^2 / ||G'||^2, over that of the
best basis of S itself.
"""

from __future__ import annotations

import argparse
import functools
import math
import statistics
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

import zoopt
from bench.published_galore import published_galore
from zoopt.bench import common
from zoopt.bench.galore_floor import Floor
from zoopt.first_order.projected.subspace import subspace

GAP = 200
BETAS, SCALE = (0.9, 0.999), 0.25


class Size(NamedTuple):
    """A LLaMA's width d, its MLP's width h, the GaLore paper's rank, and the number of layers."""

    width: int
    mlp_width: int
    rank: int
    layers: int


SIZES = {
    "60m": Size(512, 1376, 128, 8),
    "130m": Size(768, 2048, 256, 12),
    "350m": Size(1024, 2736, 256, 24),
    "1b": Size(2048, 5461, 512, 24),
    "7b": Size(4096, 11008, 1024, 32),
}
#: The greatest number of bytes for the matrices of one shape.
MAX_BYTES = 2 * 10**9


def shapes(size: Size) -> dict[str, tuple[int, int, int]]:
    """For each shape: m, n, and how many matrices of it a layer has."""
    d, h = size.width, size.mlp_width
    return {"attention": (d, d, 4), "up": (h, d, 2), "down": (d, h, 1)}


def layers_held(size: Size, m: int, n: int, count: int) -> int:
    """How many layers' matrices of a shape are stepped together: all, or as many as fit."""
    of_a_layer = count * m * n * 4 * 8  # Weights and gradients of four methods, in float32.
    return max(1, min(size.layers, MAX_BYTES // of_a_layer))


def steps(theta: Tensor, rank: int, count: int) -> dict[str, Callable[[], Any]]:
    """A step of each method on `count` matrices like theta, without a refresh."""

    def parameters() -> list[torch.nn.Parameter]:
        params = [torch.nn.Parameter(theta.clone()) for _ in range(count)]
        for param in params:
            param.grad = torch.randn(theta.shape, device=theta.device).to(theta.dtype)
        return params

    def ours(rounding: str) -> Callable[[], Any]:
        optimizer = zoopt.GaLoreAdamW(
            parameters(),
            **options,
            **group,
            stagger=False,
            rounding=rounding,
            seed=0,  # type: ignore[arg-type]
        )
        return optimizer.step

    never = 1 << 30
    options = {"lr": 1e-3, "betas": BETAS, "eps": 1e-6}
    group = {"rank": rank, "update_proj_gap": never, "scale": SCALE, "proj_type": "std"}
    theirs = published_galore()(
        [{"params": parameters(), **group}], **options, no_deprecation_warning=True
    )
    # Its first basis comes from an SVD: any of the size will do for a step.
    projector_class = sys.modules["galore_torch.galore_projector"].GaLoreProjector
    m, n = theta.shape
    shape = (rank, n) if m >= n else (m, rank)
    for param in theirs.param_groups[0]["params"]:
        projector = projector_class(rank, update_proj_gap=never, scale=SCALE)
        projector.ortho_matrix = torch.randn(shape, device=theta.device).to(theta.dtype)
        theirs.state[param] = {"step": 1, "projector": projector}
    floors = [Floor(theta.clone(), rank) for _ in range(count)]
    nearest = {} if theta.dtype == torch.float32 else {"nearest": ours("nearest")}
    return {
        "floor": lambda: [floor() for floor in floors],
        "zoopt": ours("auto"),
        **nearest,
        "published": theirs.step,
    }


def measure_shape(
    theta: Tensor, rank: int, count: int, layers: int, repeats: int, label: str
) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Durations of each method's steps, a round each, and of its refreshes; in seconds a layer."""
    device = theta.device
    whole = common.round_robin(steps(theta, rank, count * layers), device, repeats, label)
    times = {method: [second / layers for second in own] for method, own in whole.items()}
    gradient, right = torch.randn_like(theta), theta.shape[0] >= theta.shape[1]
    previous = new_basis(gradient, rank, right, "randomized", None)
    common.progress(f"{label}: refresh")
    ours = common.seconds(lambda: new_basis(gradient, rank, right, "warm", previous), device)
    theirs = common.seconds(lambda: torch.linalg.svd(gradient.float(), full_matrices=False), device)
    refreshes = {"zoopt": count * ours, "published": count * theirs}
    return times, refreshes | ({"nearest": count * ours} if "nearest" in times else {})


def new_basis(
    gradient: Tensor, rank: int, right: bool, projector: Any, previous: Tensor | None
) -> Tensor:
    return subspace(
        gradient,
        rank,
        right=right,
        projector=projector,
        previous=previous,
        seed=0,
        stream=0,
        draw=0,
    )


def step_rows(options: argparse.Namespace, device: torch.device) -> list[common.Row]:
    """A row for each size, dtype, matrix and method; the whole layer comes last."""
    rows = []
    for name in options.sizes:
        size = SIZES[name]
        for dtype in options.dtypes:
            layer: dict[str, list[float]] = {}
            spent: dict[str, float] = {}
            for kind, (m, n, count) in shapes(size).items():
                theta = torch.randn(m, n, device=device).to(common.DTYPES[dtype])
                layers = layers_held(size, m, n, count)
                label = f"{name} {dtype} {kind} {count} x {m}x{n}"
                times, refreshes = measure_shape(
                    *(theta, size.rank, count, layers, options.repeats, label)
                )
                rows += method_rows(label, times, refreshes)
                for method, own in times.items():
                    total = layer.setdefault(method, [0.0] * len(own))
                    layer[method] = [a + b for a, b in zip(total, own, strict=True)]
                for method, own_refresh in refreshes.items():
                    spent[method] = spent.get(method, 0.0) + own_refresh
            rows += method_rows(f"{name} {dtype} layer", layer, spent)
    return rows


def method_rows(
    label: str, times: dict[str, list[float]], refreshes: dict[str, float]
) -> list[common.Row]:
    """A row for each method: its step, plus its refresh spread over T steps."""
    floor = times["floor"]
    amortised = {
        method: [second + refreshes.get(method, 0.0) / GAP for second in own]
        for method, own in times.items()
    }
    return [
        common.measured(
            f"{label} {method}",
            [second * 1e3 for second in own],
            "ms",
            ratio=common.ratio(own, floor),
            refresh_ms=refreshes.get(method, 0.0) * 1e3,
            amortised_ms=statistics.median(amortised[method]) * 1e3,
            amortised_ratio=common.ratio(amortised[method], floor),
            published_over=common.ratio(times["published"], own),
            amortised_published_over=common.ratio(amortised["published"], amortised[method]),
        )
        for method, own in times.items()
    ]


class Drift:
    """Minibatch gradients (dim, dim) of a signal that turns from one refresh to the next.

    Args:
        dim: size of the square matrix.
        rank: rank of the signal; its singular values are 1/k.
        angle: how far its directions turn at each refresh, in radians.
    """

    def __init__(self, dim: int, rank: int, angle: float, device: torch.device) -> None:
        self.values = 1.0 / torch.arange(1, rank + 1, device=device)
        self.left, self.right = (_orthonormal(dim, rank, device) for _ in range(2))
        self.angle = angle

    def advance(self) -> None:
        for side in (self.left, self.right):
            fresh = _orthonormal(len(side), side.shape[1], side.device)
            q, r = torch.linalg.qr(math.cos(self.angle) * side + math.sin(self.angle) * fresh)
            # Undo the signs of Householder's QR, so that no direction flips.
            side.copy_(q * r.diagonal().sign())

    def minibatch(self) -> Tensor:
        signal = (self.left * self.values) @ self.right.t()
        noise = torch.randn_like(signal)
        return signal + noise * (signal.norm() / noise.norm())


def _orthonormal(dim: int, rank: int, device: torch.device) -> Tensor:
    basis: Tensor = torch.linalg.qr(torch.randn(dim, rank, device=device))[0]
    return basis


def captured(gradient: Tensor, basis: Tensor) -> float:
    """The share of the gradient's energy in the span of an orthonormal basis (n, r)."""
    return ((gradient @ basis).square().sum() / gradient.square().sum()).item()


def timed(work: Callable[[], Tensor], device: torch.device) -> tuple[float, Tensor]:
    """The duration in seconds, and the result."""
    made: list[Tensor] = []
    spent = common.seconds(lambda: made.append(work()), device)
    return spent, made[0]


def refresh_rows(options: argparse.Namespace, device: torch.device) -> list[common.Row]:
    """A row for each projector: its time, and its bases' held-out energy relative to the best."""
    rank = options.refresh_rank
    drift = Drift(options.refresh_dim, min(4 * rank, options.refresh_dim), 0.2, device)
    previous = new_basis(drift.minibatch(), rank, True, "randomized", None)
    # The warm basis is computed last, because the next one starts from it.
    times: dict[str, list[float]] = {"svd": [], "warm": []}
    energies: dict[str, list[float]] = {"svd": [], "warm": []}
    for turn in range(options.refreshes + 1):
        drift.advance()
        gradient, held_out = drift.minibatch(), drift.minibatch()
        best = captured(held_out, drift.right[:, :rank])
        for name in times:
            common.progress(f"refresh {turn} of {options.refreshes}: {name}")
            work = functools.partial(new_basis, gradient, rank, True, name, previous)
            spent, basis = timed(work, device)
            if turn:
                times[name].append(spent)
                energies[name].append(captured(held_out, basis) / best)
        previous = basis
    common.progress("")
    return [
        common.measured(
            f"refresh {options.refresh_dim}x{options.refresh_dim} r{rank} {name}",
            [second * 1e3 for second in own],
            "ms",
            ratio=common.ratio(own, times["svd"]),
            speedup=common.ratio(times["svd"], own),
            held_out_energy=statistics.fmean(energies[name]),
            energy_over_svd=statistics.fmean(energies[name]) / statistics.fmean(energies["svd"]),
        )
        for name, own in times.items()
    ]


STEP_COLUMNS = {
    "name": "step",
    "median": "ms",
    "ratio": "of floor",
    "refresh_ms": "refresh ms",
    "amortised_ms": f"ms with refresh/{GAP}",
    "amortised_ratio": "of floor",
    "published_over": "published over it",
    "amortised_published_over": "with refresh",
}
REFRESH_COLUMNS = {
    "name": "refresh",
    "median": "ms",
    "speedup": "times as fast as svd",
    "held_out_energy": "held-out energy, of the best",
    "energy_over_svd": "energy over svd's",
}


def parse(argv: Sequence[str] | None) -> tuple[argparse.Namespace, torch.device]:
    parser = common.parser(
        str(__doc__), "python -m bench.lowrank_step --sizes 60m 130m --json lowrank.json"
    )
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES), help="of LLaMA")
    parser.add_argument(
        "--dtypes", nargs="+", choices=("float32", "bfloat16"), default=["float32", "bfloat16"],
        help="of weights and gradients",
    )  # fmt: skip
    parser.add_argument("--refresh-dim", type=common.positive, default=2048, help="of the square")
    parser.add_argument("--refresh-rank", type=common.positive, default=128, help="of its basis")
    parser.add_argument("--refreshes", type=common.positive, default=5, help="refreshes to time")
    common.add_common_arguments(parser, repeats=7)
    options = common.parse(parser, argv)
    return options, common.open_device(parser, options)


def main(argv: Sequence[str] | None = None) -> None:
    options, device = parse(argv)
    torch.manual_seed(0)
    refreshes = refresh_rows(options, device)
    common.say(common.table(REFRESH_COLUMNS, refreshes) + "\n", options.json)
    rows = step_rows(options, device)
    common.say(common.table(STEP_COLUMNS, rows), options.json)
    common.write_json(
        options.json,
        common.document("lowrank_step", options, device, [*refreshes, *rows], ratio_to="floor"),
    )


if __name__ == "__main__":
    main()
