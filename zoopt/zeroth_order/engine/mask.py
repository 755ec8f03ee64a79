"""Sparse directions: which elements of a parameter move.

`"random"` masks come from the noise itself (`NoiseKey.density`), new for each draw, never stored.
The two kinds here are masks by magnitude and explicit indices.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from zoopt.distributed.sharding import is_sharded, kth_smallest, local
from zoopt.kernels import apply_, dispatch
from zoopt.kernels.batch import Batch, packed_like
from zoopt.kernels.descent.op import small_elements
from zoopt.kernels.descent.rule import Shape
from zoopt.kernels.noise.key import NoiseKey
from zoopt.kernels.packed import packed
from zoopt.zeroth_order.engine.direction import Coefficients, Direction
from zoopt.zeroth_order.engine.noise import Elementwise, Noise
from zoopt.zeroth_order.engine.progress import Progress

#: "random", "magnitude", or name (without names: position in the group) -> flat indices.
Mask = Literal["random", "magnitude"] | Mapping[str, Tensor] | Mapping[int, Tensor]


class SmallMagnitudes(Elementwise):
    """Noise on the elements with |theta| <= threshold only (Liu et al., 2024, arXiv:2402.15751).

    Args:
        key: the parameter's noise.
        threshold: a tensor of one element.
        mask: a flat bool tensor if the parameter will be perturbed in place, since theta's
            magnitudes cannot be read then; None to read them from theta.
    """

    def __init__(self, key: NoiseKey, threshold: Tensor, mask: Tensor | None) -> None:
        super().__init__(key)
        self.threshold = threshold
        self.mask = mask

    def combine(self, theta: Tensor, coefficients: Coefficients, start: int) -> Tensor:
        """As in `Chunkwise`."""
        total = super().combine(theta, coefficients, start)
        if self.mask is None:
            return total.mul_(theta.abs() <= self.threshold)
        return total.mul_(self.mask[start : start + theta.numel()])

    def shaping(
        self, coefficients: Coefficients, gradient: Coefficients
    ) -> tuple[Shape, Tensor | None]:
        """As in `Elementwise`."""
        if self.mask is None:
            return Shape("small"), self.threshold
        return Shape("kept"), self.mask


def choose_small(moving: Sequence[tuple[Tensor, SmallMagnitudes]]) -> None:
    """Tell directions which elements of their parameters are small, if the parameters will be
    displaced when that is needed: one launch for parameters that are alike."""
    together: dict[tuple[torch.dtype, torch.device], list[tuple[Tensor, SmallMagnitudes]]] = {}
    for param, direction in moving:
        if dispatch.launches(param) and param.is_contiguous():
            together.setdefault((param.dtype, param.device), []).append((param, direction))
        else:
            direction.mask = (param.detach().abs() <= direction.threshold).flatten()
    for (_, device), alike in together.items():
        params = [param for param, _ in alike]
        masks = packed([param.numel() for param in params], torch.bool, device)
        batch = Batch(params, [direction.key for _, direction in alike], reads=True)
        limits = [direction.threshold for _, direction in alike]
        shaped = [mask.view(param.shape) for mask, param in zip(masks, params, strict=True)]
        small_elements(batch, limits, shaped)
        for mask, (_, direction) in zip(masks, alike, strict=True):
            direction.mask = mask


class Indexed(Noise):
    """Noise on explicit elements: the i-th index moves by the noise's i-th number.

    Args:
        key: the parameter's noise.
        indices: int64, flat, each within the parameter.
    """

    def __init__(self, key: NoiseKey, indices: Tensor) -> None:
        super().__init__(key)
        self.indices: Tensor = indices
        #: Of a part of a parameter: which indices lie in it, and where.
        self._here: tuple[Tensor, Tensor] | None = None

    def of_part(self, first: int, numel: int) -> None:
        """As in `Direction`. All noise is made; that of other parts' elements goes nowhere."""
        inside = (self.indices >= first) & (self.indices < first + numel)
        self._here = inside.nonzero().squeeze(1), self.indices[inside] - first

    def queued(
        self,
        operation: str | Callable[..., Any],
        param: Tensor,
        progress: Progress | None,
        **options: Any,
    ) -> bool:
        """As in `Elementwise`; never for a part, which a kernel's indices could not be of."""
        return self._here is None and super().queued(operation, param, progress, **options)

    @classmethod
    def window(cls, moving: Sequence[tuple[Tensor, Elementwise]]) -> Batch:
        """As in `Direction`."""
        params, directions = zip(*moving, strict=True)
        return Batch(params, [own.key for own in directions], [own.indices for own in directions])

    @classmethod
    def copies(
        cls,
        window: Batch,
        directions: Sequence[Elementwise],
        coefficients: Coefficients,
        *,
        decay: float = 1.0,
    ) -> list[Tensor]:
        """As in `Direction`: a launch of torch's, which copies, and one that moves few elements."""
        copies = packed_like(window)
        if decay:
            torch._foreach_copy_(copies, list(window.tensors))
        else:
            torch._foreach_zero_(copies)
        moved = Batch(copies, window.keys, window.indices)
        apply_(moved, list(coefficients.values()), draws=list(coefficients))
        return copies

    def shape(self, param: Tensor) -> tuple[int, ...]:
        """(number of indices,)."""
        return tuple(self.indices.shape)

    @contextlib.contextmanager
    def elements(self, param: Tensor, progress: Progress | None = None) -> Iterator[Tensor]:
        """The indexed elements."""
        progress = progress or Progress()
        if self._here is None:
            with progress.indexed(param, self.indices) as values:
                yield values
            return
        positions, places = self._here
        with progress.indexed(param, places, positions, len(self.indices)) as values:
            yield values

    def perturbed(self, param: Tensor, coefficients: Coefficients) -> Tensor:
        """As in `Direction`."""
        return Direction.perturbed(self, param, coefficients)

    def perturbed_rows(self, weight: Tensor, rows: Tensor, coefficients: Coefficients) -> Tensor:
        """As in `Direction`."""
        return Direction.perturbed_rows(self, weight, rows, coefficients)


def magnitude_threshold(param: Tensor, density: float) -> Tensor:
    """The |value| below or at which ceil(density numel) elements lie: float32, ()."""
    magnitudes = local(param).detach().flatten().float().abs()
    count = math.ceil(density * param.numel())
    if is_sharded(param):
        return kth_smallest(magnitudes, count, param)
    if torch.are_deterministic_algorithms_enabled():
        # On CUDA, kthvalue then raises: which of equal elements it finds is open.
        return magnitudes.sort().values[count - 1].clone()
    return magnitudes.kthvalue(count).values


def aligned_indices(
    mask: Mapping[Any, Tensor], names: list[Any], params: list[Tensor]
) -> list[Tensor | None]:
    """The mapping's indices in the order of the parameters; None for parameters without any.

    Raises:
        TypeError, ValueError: a key that is no parameter's name, or indices that are not
            distinct integers within the parameter.
    """
    for key, indices in mask.items():
        if key not in names:
            raise ValueError(
                f"mask must name parameters of its param group, got {key!r}; the group has "
                f"{', '.join(map(repr, names[:5]))}{' ...' if len(names) > 5 else ''}"
            )
        check_indices(f"mask[{key!r}]", indices, params[names.index(key)].numel())
    return [mask.get(name) for name in names]


def check_aligned(mask: list[Any], params: list[Tensor]) -> None:
    """Raise unless the list has the form that `aligned_indices` returns for these parameters."""
    if len(mask) != len(params):
        raise ValueError(
            f"mask must be a dict of flat indices by parameter name, or have an entry for each of "
            f"the group's {len(params)} parameters, got a list of {len(mask)}"
        )
    for i, (indices, param) in enumerate(zip(mask, params, strict=True)):
        if indices is not None:
            check_indices(f"mask[{i}]", indices, param.numel())


def check_indices(name: str, indices: Any, numel: int) -> None:
    """Raise unless they are distinct flat indices of a parameter of so many elements."""
    if not isinstance(indices, Tensor) or indices.dtype not in (torch.int32, torch.int64):
        kind = indices.dtype if isinstance(indices, Tensor) else type(indices).__name__
        raise TypeError(
            f"{name} must be a tensor of int64 or int32 flat indices, got {kind}; "
            f"use bool_mask.flatten().nonzero().squeeze(1)"
        )
    if indices.layout != torch.strided or indices.is_meta:
        raise TypeError(
            f"{name} must be dense and hold values, got {indices.layout} on {indices.device}"
        )
    ordered = indices.flatten().sort().values
    distinct = indices.dim() == 1 and indices.numel() > 0 and bool((ordered.diff() > 0).all())
    if not distinct or not 0 <= int(ordered[0]) <= int(ordered[-1]) < numel:
        raise ValueError(
            f"{name} must hold distinct flat indices in [0, {numel}), at least one, got "
            f"a tensor of shape {tuple(indices.shape)}"
        )
