"""Where the closure sees its parameters: at theta + scale zo_eps z, in place or virtually.

Both kinds can hold at once: each parameter's `Slot` says which is its own.
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from zoopt.kernels import apply_, perturb, perturb_rows
from zoopt.kernels.key import NoiseKey, Rounding
from zoopt.optimizer import Group
from zoopt.zeroth_order.virtual import Substitution

PerturbationMode = Literal["auto", "inplace", "virtual"]
RoundingMode = Literal["auto", "nearest", "stochastic"]


@dataclasses.dataclass(frozen=True)
class Slot:
    """One parameter that takes part in a probe."""

    param: Tensor
    group: Group
    key: NoiseKey
    virtual: bool
    rounding: Rounding
    zo_eps: float


def _uncompiled() -> contextlib.AbstractContextManager[Any]:
    """Let compiled functions run their Python code, where parameters can be replaced."""
    if "torch._dynamo" not in sys.modules:  # nothing has been compiled, and the import is slow
        return contextlib.nullcontext()
    eager: contextlib.AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
    return eager


class Perturbation:
    """Moves the parameters of a probe from point to point around theta.

    In place, the parameters hold theta + sum_d offset[d] zo_eps z(d), and one pass leads from one
    offset to the next. The last offset is left to the update, which takes it away in its own pass
    (three passes a step instead of four); `restore` takes it away alone.
    """

    def __init__(self, slots: Sequence[Slot]) -> None:
        self.slots = slots
        self._virtual = {slot.param: slot for slot in slots if slot.virtual}
        self._in_place = [slot for slot in slots if not slot.virtual]
        self._offset: dict[int, float] = {}

    @property
    def offset(self) -> Mapping[int, float]:
        """draw -> scale: by how much parameters perturbed in place stand off theta."""
        return self._offset

    @contextlib.contextmanager
    def at(self, draw: int, scale: float) -> Iterator[None]:
        """Let parameters read as theta + scale zo_eps z(draw).

        Raises:
            RuntimeError: there are virtual parameters, and the closure read none of them.
        """
        self._move({draw: scale} if scale else {})
        if not self._virtual:
            yield
            return

        def perturbed(param: Tensor) -> Tensor:
            if not scale:
                return param
            slot = self._virtual[param]
            return perturb(param, scale * slot.zo_eps, draw=draw, **slot.key.arguments)

        def perturbed_rows(weight: Tensor, rows: Tensor) -> Tensor:
            if not scale:
                return weight[rows]
            slot = self._virtual[weight]
            alpha = scale * slot.zo_eps
            return perturb_rows(weight, rows, alpha, draw=draw, **slot.key.arguments)

        # At theta itself too: modules take the path that they take at theta + a z.
        with _uncompiled(), Substitution(self._virtual, perturbed, perturbed_rows) as substitution:
            yield
        if not substitution.read and not self._in_place:
            raise RuntimeError(
                "the closure read none of the optimizer's parameters, so a virtual perturbation "
                "cannot reach it (a compiled or scripted graph, another thread or another copy of "
                "the model); use perturbation='inplace', or call the model itself"
            )

    def restore(self) -> None:
        """Bring parameters perturbed in place back to theta."""
        self._move({})

    def forget(self) -> None:
        """The caller has taken the offset away itself."""
        self._offset = {}

    def _move(self, target: dict[int, float]) -> None:
        """Add the difference of two offsets to the parameters perturbed in place."""
        change = {draw: -scale for draw, scale in self._offset.items()}
        for draw, scale in target.items():
            change[draw] = change.get(draw, 0.0) + scale
        self._offset = target
        draws = [draw for draw, scale in change.items() if scale]
        if not draws:
            return
        with torch.no_grad():
            for slot in self._in_place:
                coefficients = [change[draw] * slot.zo_eps for draw in draws]
                apply_(slot.param, coefficients, draws=draws, **slot.key.arguments)
