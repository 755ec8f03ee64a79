"""Directions that are made chunk by chunk, and the chunks of a parameter.

An update that needs the gradient estimate itself (Adam's, a sign's) runs over the parameter in
chunks, and never holds a whole estimate.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from zoopt.dtypes import Rounding, accumulator_dtype
from zoopt.kernels import add_, apply_
from zoopt.kernels.descent.rule import Rule
from zoopt.kernels.dispatch import is_fake
from zoopt.kernels.noise.key import NoiseKey
from zoopt.zeroth_order.engine.direction import Coefficients, Direction
from zoopt.zeroth_order.engine.progress import Progress

#: Elements of a chunk: a few such float32 buffers stay in a CPU's second-level cache; on a GPU
#: they are large enough to hide the launches.
_CHUNK = {"cpu": 1 << 17, "cuda": 1 << 24}


def chunks(elements: Tensor, progress: Progress | None = None) -> Iterator[slice]:
    """Slices that cover a flat tensor, in order; of a fake one the first: memory is counted there,
    and each takes the same.

    Args:
        progress: that of the pass, whose pieces the slices are: those that are written are left
            out.
    """
    size = _CHUNK.get(elements.device.type, _CHUNK["cuda"])
    end = min(size, elements.numel()) if is_fake(elements) else elements.numel()
    for number, start in enumerate(range(0, end, size)):
        chunk = slice(start, min(start + size, elements.numel()))
        if progress is None:
            yield chunk
            continue
        if progress.begin(number, elements[chunk]):
            yield chunk
        progress.end(number)


def whole(elements: Tensor, progress: Progress | None) -> Iterator[None]:
    """Once, for all elements as one piece, unless they are written."""
    if progress is None or progress.begin(0, elements):
        yield
    if progress is not None:
        progress.end(0)


class Chunkwise(Direction):
    """A direction any stretch of which can be made by itself.

    Args:
        key: the parameter's noise.
    """

    def __init__(self, key: NoiseKey) -> None:
        self.key = key

    def of_part(self, first: int, numel: int) -> None:
        """As in `Direction`: its noise is that of its place in the whole."""
        self.key = self.key.shifted(first)

    def elements(
        self, param: Tensor, progress: Progress | None = None
    ) -> contextlib.AbstractContextManager[Tensor]:
        """What moves, flat; changes made to it are the parameter's on leaving."""
        raise NotImplementedError

    def descends(
        self,
        param: Tensor,
        coefficients: Coefficients,
        gradient: Coefficients,
        progress: Progress | None,
        *,
        rule: Rule,
        state: Mapping[str, Tensor],
        **options: Any,
    ) -> bool:
        """Whether an update is made later, together with others (see `descend_`).

        Args:
            coefficients, gradient: coefficients of the parameter's displacement and the estimate.
            rule, state: the rule that turns the estimate into an update, and its state; flat or of
                the parameter's shape.
            options: decay, rounding and rounding_draw.
        """
        raise NotImplementedError

    def combine(self, theta: Tensor, coefficients: Coefficients, start: int) -> Tensor:
        """sum_d coefficients[d] z(d) of elements start ... start + len(theta) - 1.

        Args:
            theta: the chunk of elements, flat.
            coefficients: draw -> coefficient.
            start: the chunk's position in `elements`.

        Returns:
            A new flat tensor in the accumulator's dtype.
        """
        total = theta.new_zeros(theta.shape, dtype=accumulator_dtype(theta.dtype))
        if coefficients:
            apply_(
                total,
                list(coefficients.values()),
                draws=list(coefficients),
                key=self.key.shifted(start),
            )
        return total

    def write_(
        self,
        theta: Tensor,
        coefficients: Coefficients,
        update: Tensor,
        start: int,
        *,
        decay: float,
        rounding: Rounding,
        rounding_draw: int | None,
    ) -> None:
        """theta <- round(decay theta + sum_d coefficients[d] z(d) + update), a chunk of elements.

        `update` is of the chunk's shape, in the accumulator's dtype.
        """
        if coefficients:
            update = update + self.combine(theta, coefficients, start)
        add_(
            theta,
            update,
            [],
            draws=[],
            decay=decay,
            rounding=rounding,
            rounding_draw=rounding_draw,
            key=self.key.shifted(start),
        )

    def add_(
        self,
        param: Tensor,
        coefficients: Coefficients,
        *,
        decay: float = 1.0,
        rounding: Rounding = "nearest",
        progress: Progress | None = None,
    ) -> None:
        """As in `Direction`, chunk by chunk."""
        last = max(coefficients, default=None)
        rounds: dict[str, Any] = {
            "decay": decay,
            "rounding": "nearest" if last is None else rounding,
            "rounding_draw": last,
        }
        if self.descends(param, coefficients, {}, progress, rule=Rule(), state={}, **rounds):
            return
        with self.elements(param, progress) as elements:
            for chunk in chunks(elements, progress):
                theta = elements[chunk]
                self.write_(
                    theta,
                    {},
                    self.combine(theta, coefficients, chunk.start),
                    chunk.start,
                    **rounds,
                )

    def momentum_(
        self,
        param: Tensor,
        buffer: Tensor,
        coefficients: Coefficients,
        gradient: Coefficients,
        *,
        momentum: float,
        step_size: float,
        decay: float,
        rounding: Rounding,
        progress: Progress,
    ) -> None:
        """One pass over the parameter and a buffer of the shape of what moves:

        buffer <- momentum buffer + sum_d gradient[d] z(d)
        param  <- round(decay param + sum_d coefficients[d] z(d) + step_size buffer)
        """
        flat = buffer.view(-1)
        rounds: dict[str, Any] = {
            "decay": decay,
            "rounding": rounding,
            "rounding_draw": max(gradient),
        }
        rule = Rule("momentum", (momentum, step_size))
        if self.descends(
            param, coefficients, gradient, progress, rule=rule, state={"first": buffer}, **rounds
        ):
            return
        with self.elements(param, progress) as elements:
            for chunk in chunks(elements, progress):
                theta = elements[chunk]
                grown = flat[chunk] * momentum
                grown.add_(self.combine(theta, gradient, chunk.start))
                progress.hold((flat[chunk], grown))
                self.write_(
                    theta,
                    coefficients,
                    grown * step_size,
                    chunk.start,
                    **rounds,
                )

    def tangent(self, param: Tensor, draw: int) -> Tensor:
        """z(draw) itself, in the parameter's shape and dtype."""
        z = torch.zeros_like(param, memory_format=torch.contiguous_format)
        with self.elements(param) as elements, self.elements(z) as flat:
            for chunk in chunks(elements):
                flat[chunk] = self.combine(elements[chunk], {draw: 1.0}, chunk.start)
        return z
