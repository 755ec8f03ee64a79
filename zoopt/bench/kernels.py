"""Time of the kernels against the published way, a plain pass, and a copy.

The published way seeds the generator, draws z by torch.normal and adds eps z out of place. The
floor is theta.mul_(c), a plain pass that reads and writes theta in place; the copy, dst.copy_(src),
moves as many bytes. All of a dtype's methods are timed in turn, round by round, and a ratio is the
median over the rounds. adam_window_ over 10 directions is also compared with apply_ over one.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Any, get_args

import torch
from torch import Tensor

from zoopt import noise
from zoopt.bench import charts, common
from zoopt.bench.kernels_first_order import first_order
from zoopt.bench.published_mezo import add_direction
from zoopt.kernels import adam_window_, add_, apply_, momentum_, perturb
from zoopt.kernels.noise.key import Distribution, NoiseKey

#: GPU calls are short: this many are queued and timed together.
CUDA_CALLS = 20
EPS = 1e-3
DRAWS = 10
DENSITY = 0.1
#: Two methods whose ratio is reported: at most DRAWS, if the noise dominates the time.
APPLY, ADAM = "apply_ 1 draw", f"adam_window_ {DRAWS} draws"

UNIT = "ns/element"
FLOOR = "mul_ (floor)"
COLUMNS = {
    "method": "method",
    "distribution": "distribution",
    "dtype": "dtype",
    "median": UNIT,
    "spread": "+-",
    "gigabytes_per_second": "GB/s",
    "times_as_fast_as_published": "x published",
    "ratio": "/ floor",
    "fraction_of_copy_bandwidth": "of copy",
}


@dataclasses.dataclass(frozen=True)
class Method:
    """One thing to time.

    `published_passes`: how many passes of the published way do the same work, one a direction.
    """

    name: str
    distribution: str
    run: Callable[[], Any]
    bytes_per_element: int
    published_passes: int | None = 1

    @property
    def label(self) -> str:
        """The name of its row, without the dtype."""
        return f"{self.name} {self.distribution}".rstrip(" -")


def methods(theta: Tensor) -> Iterator[Method]:
    """The methods timed on one tensor. theta drifts by a few eps, which does not affect times."""
    # The published way replaces its tensor's storage, so it gets a tensor of its own.
    own, other = theta.clone(), torch.empty_like(theta)
    buffer, addend = (torch.zeros_like(theta, dtype=torch.float32) for _ in range(2))
    move = 2 * theta.element_size()
    yield Method("copy_", "-", lambda: other.copy_(theta), move, None)
    yield Method(FLOOR, "-", lambda: theta.mul_(1.0), move, None)
    yield Method("published", "normal", lambda: add_direction([own], 1, EPS), move)
    for name, run, size in first_order(theta):
        yield Method(name, "-", run, size, None)
    narrow = theta.dtype != torch.float32
    for distribution in get_args(Distribution):
        key: dict[str, Any] = {"key": NoiseKey(1, 2, distribution=distribution)}
        sparse = NoiseKey(1, 2, distribution=distribution, density=DENSITY)
        one = {**key, "draws": [3]}

        def in_place(key: dict[str, Any] = key) -> Tensor:
            return perturb(theta, EPS, draw=3, out=theta, **key)

        def out_of_place(key: dict[str, Any] = key) -> Tensor:
            return perturb(theta, EPS, draw=3, out=other, **key)

        def update(one: dict[str, Any] = one) -> Tensor:
            return apply_(theta, [EPS], decay=0.9999, **one)

        def stochastic(one: dict[str, Any] = one) -> Tensor:
            return apply_(theta, [EPS], decay=0.9999, rounding="stochastic", **one)

        def many(key: dict[str, Any] = key) -> Tensor:
            return apply_(theta, [EPS] * DRAWS, draws=range(DRAWS), decay=0.9999, **key)

        def masked(key: NoiseKey = sparse) -> Tensor:
            return perturb(theta, EPS, draw=3, out=theta, key=key)

        def add(one: dict[str, Any] = one) -> Tensor:
            return add_(theta, addend, [EPS], decay=0.9999, **one)

        def adam(key: dict[str, Any] = key) -> Tensor:
            # Each direction belongs to another step, which is the slowest case.
            return adam_window_(
                theta,
                [EPS] * DRAWS,
                [1.0] * DRAWS,
                [0.1] * DRAWS,
                [0.1] * DRAWS,
                [True] * DRAWS,
                eps=1e-8,
                step_size=-1e-6,
                draws=range(DRAWS),
                decay=0.9999,
                **key,
            )

        def momentum(one: dict[str, Any] = one) -> Tensor:
            return momentum_(theta, buffer, [EPS], [1.0], momentum=0.9, step_size=-1e-6, **one)

        yield Method("perturb in place", distribution, in_place, move)
        yield Method(f"perturb in place, density {DENSITY}", distribution, masked, move)
        yield Method("perturb to out", distribution, out_of_place, move)
        yield Method(APPLY, distribution, update, move)
        if narrow:
            yield Method("apply_ 1 draw, stochastic", distribution, stochastic, move)
        yield Method(f"apply_ {DRAWS} draws", distribution, many, move, DRAWS)
        yield Method("add_ 1 draw", distribution, add, move + 4)
        yield Method("momentum_ 1 draw", distribution, momentum, move + 8)
        yield Method(ADAM, distribution, adam, move, DRAWS)


def measure(dtype: str, device: torch.device, options: argparse.Namespace) -> list[common.Row]:
    """A row a method."""
    theta = noise.normal(options.numel, seed=0, stream=0, draw=0, device=device)
    theta = theta.to(common.DTYPES[dtype])
    chosen = {method.label: method for method in methods(theta)}
    calls = CUDA_CALLS if device.type == "cuda" else 1
    runs = {label: method.run for label, method in chosen.items()}
    times = common.round_robin(runs, device, options.repeats, dtype, calls)
    copy, floor, reference = (times[k] for k in ("copy_", FLOOR, "published normal"))
    rows = []
    for label, method in chosen.items():
        own, passes = times[label], method.published_passes
        traffic = method.bytes_per_element * options.numel
        moved = method.bytes_per_element / (2 * theta.element_size())
        apply = times[f"{APPLY} {method.distribution}"] if method.name == ADAM else None
        rows.append(
            common.measured(
                f"{label}, {dtype}",
                [second * 1e9 / options.numel for second in own],
                UNIT,
                ratio=common.ratio(own, floor),
                method=method.name,
                distribution=method.distribution,
                dtype=dtype,
                bytes_per_element=method.bytes_per_element,
                gigabytes_per_second=traffic / statistics.median(own) / 1e9,
                published_passes=passes,
                times_as_fast_as_published=1 / common.ratio(own, reference, passes)
                if passes
                else None,
                fraction_of_copy_bandwidth=moved / common.ratio(own, copy),
                ratio_to_apply_1_draw=common.ratio(own, apply) if apply else None,
            )
        )
    return rows


def panels(rows: Sequence[common.Row]) -> list[charts.Panel]:
    """A panel a dtype."""
    found = []
    for value in dict.fromkeys(row["dtype"] for row in rows):
        chosen = [
            {**row, "name": row["name"].replace(f", {value}", "")}
            for row in rows
            if row["dtype"] == value
        ]
        ours = frozenset(
            row["name"] for row in chosen if row.get("method") not in ("copy_", FLOOR, "published")
        )
        title = f"{value}: {chosen[0]['unit']}"
        found.append(charts.Panel(title, chosen, 1.0, ours, FLOOR))
    return found


def report_times(rows: Sequence[common.Row], options: argparse.Namespace) -> None:
    """Print the table of one dtype."""
    common.say(common.table(COLUMNS, rows), options.json)
    for row in rows:
        if row["ratio_to_apply_1_draw"]:
            common.say(
                f"adam_window {DRAWS} directions / apply_ 1 direction, "
                f"{row['distribution']}: {row['ratio_to_apply_1_draw']:.2f}",
                options.json,
            )
    common.say("", options.json)


def parse(argv: Sequence[str] | None) -> tuple[argparse.Namespace, torch.device]:
    """The options, and the device to measure on."""
    parser = common.parser(
        str(__doc__),
        "zoopt bench kernels --numel 2**26 --dtype float32 bfloat16 --json kernels.json",
    )
    parser.add_argument(
        "--numel", type=common.positive, default=1 << 26, help="elements of theta, 2**26 say"
    )
    parser.add_argument(
        "--dtype",
        nargs="+",
        metavar="DTYPE",
        choices=("float32", "bfloat16", "float16"),
        default=["float32", "bfloat16", "float16"],
        help="one or more of float32, bfloat16, float16",
    )
    common.add_common_arguments(parser, repeats=9)
    options = common.parse(parser, argv)
    return options, common.open_device(parser, options)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line entry; returns the exit status."""
    options, device = parse(argv)
    rows: list[common.Row] = []
    for dtype in options.dtype:
        of_dtype = measure(dtype, device, options)
        report_times(of_dtype, options)
        rows += of_dtype
    common.say(
        "x published: how many times as fast as the published way (as many passes as "
        "directions); / floor: time\nover that of theta.mul_(c); of copy: bandwidth over that "
        "of dst.copy_(src); +-: interquartile range",
        options.json,
    )
    content = common.document("kernels", options, device, rows, ratio_to="theta.mul_(c)")
    common.write_json(options.json, content)
    if options.plot:
        charts.draw(options.plot, content, "The kernels", panels(rows))
        common.say(f"written: {options.plot}", options.json)
    return 0
