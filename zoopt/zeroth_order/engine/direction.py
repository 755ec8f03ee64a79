"""Directions: z of one parameter as a function of the draw, regenerated wherever it is needed.

A direction knows how to add sum_d c_d z(d) to its parameter, in place or to a copy. Those that are
elementwise also give any stretch of the sum, so that an update that needs the gradient estimate
itself (Adam's, a sign's) runs over the parameter chunk by chunk and never holds a whole one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from zoopt.dtypes import Rounding, accumulator_dtype
from zoopt.kernels import add_, apply_, dispatch, momentum_, perturb, perturb_rows
from zoopt.kernels.batch import Batch, packed_like
from zoopt.kernels.descent.op import descend_
from zoopt.kernels.descent.rule import Rule, Shape
from zoopt.kernels.dispatch import is_fake
from zoopt.kernels.noise.key import NoiseKey
from zoopt.kernels.noise.op import perturbed_copies
from zoopt.zeroth_order.engine.progress import Progress

#: draw -> coefficient: the displacement sum_d coefficient_d z(d).
Coefficients = Mapping[int, float]

#: Elements of a chunk: a few such float32 buffers stay in a CPU's second-level cache; on a GPU
#: they are large enough to hide the launches.
_CHUNK = {"cpu": 1 << 17, "cuda": 1 << 24}


def withdrawn(offset: Coefficients, decay: float) -> dict[int, float]:
    """The coefficients that, beside decay theta, take the offset of theta + sum_d offset[d] z(d)
    away."""
    return {draw: -decay * coefficient for draw, coefficient in offset.items()}


def descent(
    offset: Coefficients, g: Mapping[int, float], *, lr: float, decay: float
) -> dict[int, float]:
    """theta <- decay theta - lr sum_d g_d z(d), from theta + sum_d offset[d] z(d).

    Returns:
        draw -> coefficient: what is added beside decay times the present value, in one pass.
    """
    total = withdrawn(offset, decay)
    for draw, g_d in g.items():
        total[draw] = total.get(draw, 0.0) - lr * g_d
    return {draw: total[draw] for draw in sorted(total) if total[draw]}


class Direction:
    """z of one parameter. `elements` is the flat tensor of what the direction can move."""

    #: Whether displacements are products of thin factors.
    thin = False
    #: Whether one launch can make the temporaries of several parameters, see `copies`.
    in_windows = False
    #: Whether the next step's direction is the same, if nothing about the parameter changes.
    lasting = False

    def form(self, coefficients: Coefficients) -> tuple[Any, ...]:
        """Where `in_windows`, what directions of one launch have in common."""
        raise NotImplementedError

    @classmethod
    def window(cls, moving: Sequence[tuple[Tensor, Any]]) -> Batch:
        """Where `in_windows`, contiguous parameters with directions of one form, as a batch."""
        raise NotImplementedError

    @classmethod
    def copies(
        cls,
        window: Batch,
        directions: Sequence[Any],
        coefficients: Coefficients,
        *,
        decay: float = 1.0,
    ) -> list[Tensor]:
        """Where `in_windows`, decay theta + sum_d coefficients[d] z(d) of the parameters of a
        window, as views of one buffer, which lives as long as one of them.

        Args:
            decay: 1 for `perturbed` parameters, or 0 for their displacements alone.
        """
        raise NotImplementedError

    def of_part(self, first: int, numel: int) -> None:
        """The parameter is only a part of the whole one: `numel` elements from `first` on."""

    def add_(
        self,
        param: Tensor,
        coefficients: Coefficients,
        *,
        decay: float = 1.0,
        rounding: Rounding = "nearest",
        progress: Progress | None = None,
    ) -> None:
        """param <- round(decay param + sum_d coefficients[d] z(d)), in place.

        Args:
            progress: that of a pass which broke off, to be finished.
        """
        raise NotImplementedError

    def perturbed(self, param: Tensor, coefficients: Coefficients) -> Tensor:
        """A copy of the parameter with the displacement added."""
        copy = param.detach().clone(memory_format=torch.contiguous_format)
        self.add_(copy, coefficients)
        return copy

    def perturbed_rows(self, weight: Tensor, rows: Tensor, coefficients: Coefficients) -> Tensor:
        """The rows of `perturbed(weight, ...)` that an embedding gathers: (*rows.shape, d)."""
        return self.perturbed(weight, coefficients)[rows]

    def tangent(self, param: Tensor, draw: int) -> Tensor:
        """z(draw) itself, in the parameter's shape and dtype."""
        raise NotImplementedError

    @classmethod
    def pairs_together(
        cls, directions: Sequence[Any], coefficients: Coefficients, dtype: torch.dtype
    ) -> list[tuple[Tensor, Tensor]]:
        """Where `thin`, L (D, m, r) and R (D, n, r) of several directions of this class on one
        device, with sum_d L[d] R[d]^T = sum_d coefficients[d] z(d): by as many launches as of one.
        """
        raise NotImplementedError

    def factors(self, coefficients: Coefficients) -> tuple[Tensor, Tensor] | None:
        """L (m, k) and R (n, k), so that the displacement of an (m, n) matrix is L R^T; or None."""
        return None


class Elementwise(Direction):
    """A direction any stretch of which can be made by itself.

    Args:
        key: the parameter's noise.
    """

    #: The parameter's elements that move, flat, if those are not all.
    indices: Tensor | None = None
    in_windows = True

    def __init__(self, key: NoiseKey) -> None:
        self.key = key

    def of_part(self, first: int, numel: int) -> None:
        """As in `Direction`: its noise is that of its place in the whole."""
        self.key = self.key.shifted(first)

    def form(self, coefficients: Coefficients) -> tuple[Any, ...]:
        """As in `Direction`."""
        key, (shape, _) = self.key, self.shaping(coefficients, {})
        return (type(self), shape, key.seed, key.distribution, key.density)

    @classmethod
    def window(cls, moving: Sequence[tuple[Tensor, Elementwise]]) -> Batch:
        """As in `Direction`."""
        return Batch([param for param, _ in moving], [direction.key for _, direction in moving])

    @classmethod
    def copies(
        cls,
        window: Batch,
        directions: Sequence[Elementwise],
        coefficients: Coefficients,
        *,
        decay: float = 1.0,
    ) -> list[Tensor]:
        """As in `Direction`: one launch."""
        copies = packed_like(window.tensors)
        moving = zip(directions, window.tensors, strict=True)
        terms = [own._terms(theta, coefficients, {}) for own, theta in moving]
        beside = [read["beside"] for _, read in terms]
        descend_(window, out=copies, rule=Rule(), decay=decay, beside=beside, **terms[0][0])
        return copies

    def shaping(
        self, coefficients: Coefficients, gradient: Coefficients
    ) -> tuple[Shape, Tensor | None]:
        """What makes displacements of sums of directions, as kernels know it, and what that reads
        beside the parameter.

        Args:
            coefficients, gradient: of what the parameter receives, and of the estimate.
        """
        raise NotImplementedError

    def sums(self, coefficients: Coefficients) -> Coefficients:
        """The coefficients of the noise itself."""
        return coefficients

    def shape(self, param: Tensor) -> tuple[int, ...]:
        """The shape of what moves: the parameter's own, unless few of its elements do."""
        return tuple(param.shape)

    def elements(
        self, param: Tensor, progress: Progress | None = None
    ) -> contextlib.AbstractContextManager[Tensor]:
        """What moves, flat; changes made to it are the parameter's on leaving."""
        if param.is_contiguous():
            return contextlib.nullcontext(param.detach().view(-1))
        return self._through_copy(param, progress)

    @contextlib.contextmanager
    def _through_copy(self, param: Tensor, progress: Progress | None) -> Iterator[Tensor]:
        with (progress or Progress()).dense(param) as dense:
            yield dense.view(-1)

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

    def queued(
        self, operation: str, param: Tensor, progress: Progress | None, **options: Any
    ) -> bool:
        """Whether a pass is made later, together with others (see `Passes.put`)."""
        if progress is None or progress.passes is None:
            return False
        return progress.passes.put(
            operation, param, self.key, progress, indices=self.indices, **options
        )

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
        if progress is None or progress.passes is None or not progress.passes.takes(param):
            return False
        numbers, beside = self._terms(param, coefficients, gradient)
        for name, tensor in state.items():
            beside[name] = tensor.view(self.shape(param))
        options = {**numbers, "rule": rule, **options}
        return self.queued("descend", param, progress, beside=beside, **options)

    def _terms(
        self, param: Tensor, coefficients: Coefficients, gradient: Coefficients
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Both sums as `descend_` takes them, and what it reads beside the parameter."""
        shape, read = self.shaping(coefficients, gradient)
        coefficients, gradient = self.sums(coefficients), self.sums(gradient)
        draws = sorted(coefficients.keys() | gradient.keys())
        beside = {}
        if read is not None:
            beside["beside"] = read if shape.kind == "small" else read.view(self.shape(param))
        return {
            "coefficients": [coefficients.get(draw, 0.0) for draw in draws],
            "gradients": [gradient.get(draw, 0.0) for draw in draws],
            "draws": draws,
            "shape": shape,
        }, beside

    def perturbed(self, param: Tensor, coefficients: Coefficients) -> Tensor:
        """As in `Direction`; one launch, where that is what operations are."""
        if self.indices is not None or not dispatch.launches(param):
            return super().perturbed(param, coefficients)
        copy = torch.empty_like(param, memory_format=torch.contiguous_format)
        numbers, beside = self._terms(param, coefficients, {})
        batch = Batch((param.detach(),), (self.key,))
        others: dict[str, Any] = {name: (tensor,) for name, tensor in beside.items()}
        descend_(batch, out=(copy,), rule=Rule(), **numbers, **others)
        return copy

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


class Noise(Elementwise):
    """Independent elements: each operation is one pass of a fused kernel."""

    lasting = True

    @classmethod
    def copies(
        cls,
        window: Batch,
        directions: Sequence[Elementwise],
        coefficients: Coefficients,
        *,
        decay: float = 1.0,
    ) -> list[Tensor]:
        """As in `Direction`: one launch."""
        alphas = list(coefficients.values())
        return perturbed_copies(window, alphas, draws=list(coefficients), decay=decay)

    def shaping(
        self, coefficients: Coefficients, gradient: Coefficients
    ) -> tuple[Shape, Tensor | None]:
        """As in `Elementwise`: none."""
        return Shape(), None

    def add_(
        self,
        param: Tensor,
        coefficients: Coefficients,
        *,
        decay: float = 1.0,
        rounding: Rounding = "nearest",
        progress: Progress | None = None,
    ) -> None:
        """As in `Direction`."""
        draws = sorted(coefficients)
        numbers = [coefficients[draw] for draw in draws]
        options: dict[str, Any] = {
            "draws": draws,
            "decay": decay,
            "rounding": rounding if draws else "nearest",
        }
        if self.queued("apply", param, progress, coefficients=numbers, **options):
            return
        with self.elements(param, progress) as elements:
            if progress is None or progress.begin(0, elements):
                apply_(elements, numbers, key=self.key, **options)
            if progress is not None:
                progress.end(0)

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
        """As in `Elementwise`."""
        draws = sorted(coefficients.keys() | gradient.keys())
        own = [coefficients.get(draw, 0.0) for draw in draws]
        gradients = [gradient.get(draw, 0.0) for draw in draws]
        options: dict[str, Any] = {
            "momentum": momentum,
            "step_size": step_size,
            "draws": draws,
            "decay": decay,
            "rounding": rounding,
        }
        options |= {"coefficients": own, "gradients": gradients}
        if self.queued("momentum", param, progress, beside={"buffer": buffer}, **options):
            return
        with self.elements(param, progress) as elements:
            for _ in whole(elements, progress):
                momentum_(elements, buffer.view(-1), key=self.key, **options)

    def perturbed(self, param: Tensor, coefficients: Coefficients) -> Tensor:
        """As in `Direction`, in one pass if there is one draw."""
        if len(coefficients) != 1:
            return super().perturbed(param, coefficients)
        [(draw, alpha)] = coefficients.items()
        return perturb(param, alpha, draw=draw, key=self.key)

    def perturbed_rows(self, weight: Tensor, rows: Tensor, coefficients: Coefficients) -> Tensor:
        """As in `Direction`, without the other rows if there is one draw."""
        if len(coefficients) != 1:
            return super().perturbed_rows(weight, rows, coefficients)
        [(draw, alpha)] = coefficients.items()
        return perturb_rows(weight, rows, alpha, draw=draw, key=self.key)

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
        """As in `Elementwise`, with the directions made in the same pass."""
        add_(
            theta,
            update,
            list(coefficients.values()),
            draws=list(coefficients),
            decay=decay,
            rounding=rounding,
            rounding_draw=rounding_draw,
            key=self.key.shifted(start),
        )


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
