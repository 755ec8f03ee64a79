"""Block-wise descent in float64: a step of an oracle on one block, the others resting."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from tests.reference.mezo_float64 import Loss, Params


@dataclasses.dataclass
class Blocks64:
    """Cyclic blocks, each with an oracle of its own; the draws are counted over all steps."""

    blocks: Sequence[Callable[[str], bool]]
    oracles: Sequence[Any]
    steps: int = 0
    draw: int = 0

    def step(self, loss: Loss, theta: Params) -> Params:
        due = self.steps % len(self.blocks)
        mine = {
            name: w
            for name, w in theta.items()
            if next(i for i, block in enumerate(self.blocks) if block(name)) == due
        }
        oracle = self.oracles[due]
        oracle.draw = self.draw
        moved = oracle.step(lambda part: loss({**theta, **part}), mine)
        self.draw = oracle.draw
        self.steps += 1
        return {**theta, **moved}
