"""The sections of `zoopt doctor --gpu`, and a command that runs one of them.

`python -m zoopt.doctor.gpu.sections NAME SCALE DEVICE` prints each row on a line as soon as it is
measured. If a time limit stops the process, the rows so far are kept.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable

import torch

from zoopt.bench.common import Row
from zoopt.doctor.gpu import checks, first_order, kernels, zeroth_order
from zoopt.doctor.gpu.rows import Emit
from zoopt.doctor.gpu.scale import SCALES, Scale


@dataclasses.dataclass(frozen=True)
class Section:
    """A part of the report.

    Attributes:
        summary: a description of it.
        measure: runs it, and emits each row.
        share: the greatest share of the whole time limit that it may use.
    """

    summary: str
    measure: Callable[[Scale, torch.device, Emit], None]
    share: float


#: In order of importance, because a time limit skips the last ones.
SECTIONS = {
    zeroth_order.SECTION: Section(
        "MeZO and others beside two forward passes", zeroth_order.measure, 0.4
    ),
    first_order.SECTION: Section("steps beside torch's fused AdamW", first_order.measure, 0.5),
    zeroth_order.LARGE: Section(
        "MeZO on a model that fills the GPU", zeroth_order.measure_large, 0.3
    ),
    kernels.SECTION: Section("kernels beside a copy", kernels.measure, 0.3),
    first_order.FUSED: Section("updates within the backward pass", first_order.measure_fused, 0.3),
    first_order.PLAN: Section("planned and allocated memory", first_order.measure_plan, 0.3),
    checks.SELF_TESTS: Section("noise and kernels against answers", checks.run_self_tests, 0.3),
    checks.TESTS: Section("the checkout's tests of a GPU", checks.run_tests, 1.0),
}


def main(name: str, scale: str, device: str) -> None:
    """Run one section. Its rows go to standard output, everything else to standard error."""
    lines, sys.stdout = sys.stdout, sys.stderr

    def emit(row: Row) -> None:
        lines.write(json.dumps(row) + "\n")
        lines.flush()

    SECTIONS[name].measure(SCALES[scale], torch.device(device), emit)


if __name__ == "__main__":
    main(*sys.argv[1:])
