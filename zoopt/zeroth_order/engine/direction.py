"""Directions: z of one parameter as a function of the draw, regenerated wherever it is needed.

A direction knows how to add sum_d c_d z(d) to its parameter, in place or to a copy.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from zoopt.dtypes import Rounding
from zoopt.kernels.batch import Batch
from zoopt.zeroth_order.engine.progress import Progress

#: draw -> coefficient: the displacement sum_d coefficient_d z(d).
Coefficients = Mapping[int, float]


class Direction:
    """z of one parameter. `elements` is the flat tensor of what the direction can move."""

    #: Whether displacements are products of thin factors.
    thin = False
    #: Whether one launch can make the temporaries of several parameters, see `copies`.
    in_windows = False
    #: Whether the next step's direction is the same, if nothing about the parameter changes.
    lasting = False
    #: Besides the class, what directions of parameters that one pass serves have in common.
    kin: Hashable = None

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
    ) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """Where `thin`, L (D, m, r) and R (D, n, r) of each of several directions of this class on
        one device, with sum_d L[d] R[d]^T = sum_d coefficients[d] z(d): by as many launches as of
        one. Those of a `Lasting` are prepared once.
        """
        raise NotImplementedError

    def factors(self, coefficients: Coefficients) -> tuple[Tensor, Tensor] | None:
        """L (m, k) and R (n, k), so that the displacement of an (m, n) matrix is L R^T; or None."""
        return None
