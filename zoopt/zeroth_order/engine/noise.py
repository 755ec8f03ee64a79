"""The noise as a parameter's direction: each operation is one pass of a fused kernel.

On a GPU one launch serves several parameters, at once (`copies`) or later (`queued`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from zoopt.dtypes import Rounding
from zoopt.kernels import add_, apply_, dispatch, momentum_, perturb, perturb_rows
from zoopt.kernels.batch import Batch, packed_like
from zoopt.kernels.descent.op import descend_
from zoopt.kernels.descent.rule import Rule, Shape
from zoopt.kernels.noise.op import perturbed_copies
from zoopt.kernels.places import Kept
from zoopt.zeroth_order.engine.chunks import Chunkwise, whole
from zoopt.zeroth_order.engine.direction import Coefficients
from zoopt.zeroth_order.engine.progress import Progress


class Elementwise(Chunkwise):
    """Displacements of independent elements, all of them or some."""

    #: The parameter's elements that move, flat, if those are not all.
    indices: Tensor | None = None
    in_windows = True
    lasting = True

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
        copies = packed_like(window)
        numbers, _ = directions[0]._terms(window.tensors[0], coefficients, {})
        if "beside" not in window.kept:
            beside: list[Any] = [own.shaping(coefficients, {})[1] for own in directions]
            if numbers["shape"].kind != "small":
                pairs = zip(beside, window.tensors, strict=True)
                beside = [read.view(theta.shape) for read, theta in pairs]
            window.kept["beside"] = Kept(beside)
        beside = window.kept["beside"]
        descend_(window, out=copies, rule=Rule(), decay=decay, beside=beside, **numbers)
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
        """As in `Chunkwise`; a copy, where the parameter is not contiguous."""
        if param.is_contiguous():
            return contextlib.nullcontext(param.detach().view(-1))
        return self._through_copy(param, progress)

    @contextlib.contextmanager
    def _through_copy(self, param: Tensor, progress: Progress | None) -> Iterator[Tensor]:
        with (progress or Progress()).dense(param) as dense:
            yield dense.view(-1)

    def queued(
        self,
        operation: str | Callable[..., Any],
        param: Tensor,
        progress: Progress | None,
        **options: Any,
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
        """As in `Chunkwise`."""
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


class Noise(Elementwise):
    """Independent elements: each operation is one pass of a fused kernel."""

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
        """As in `Chunkwise`."""
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
        """As in `Chunkwise`, with the directions made in the same pass."""
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
