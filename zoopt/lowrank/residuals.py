"""The residual rule: what becomes of the part of a gradient outside its subspace.

A residual turns the rule's direction N (channels, r) of the projected gradient R into the terms of
one write of theta: a low-rank product, and a multiple of the gradient for each channel.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from zoopt.lowrank.geometry import Geometry
from zoopt.optimizer import Group, TensorSpec

State = dict[str, Tensor]


class Terms(NamedTuple):
    """What is descended: the way up of `product`, plus channel_scale times the gradient, plus
    sign_step times the signs of the gradient outside its subspace.

    Attributes:
        product: (channels, r), or None.
        channel_scale: (channels,), or (1,) for all, or None.
        sign_step: a number; 0 for no such term.
    """

    product: Tensor | None
    channel_scale: Tensor | None = None
    sign_step: float = 0.0


class Residual(NamedTuple):
    """A residual's state and its terms.

    Attributes:
        specs: geometry, accumulator's dtype -> the state tensors.
        terms: direction, R, gradient (m, n), state, group, geometry -> what is descended.
        needs_gradient: whether `terms` has one that multiplies the whole gradient.
    """

    specs: Callable[[Geometry, torch.dtype], dict[str, TensorSpec]]
    terms: Callable[[Tensor, Tensor, Tensor | None, State, Group, Geometry], Terms]
    needs_gradient: bool


def _no_specs(geo: Geometry, accumulator: torch.dtype) -> dict[str, TensorSpec]:
    return {}


def _dropped(
    direction: Tensor,
    reduced: Tensor,
    gradient: Tensor | None,
    state: State,
    group: Group,
    geo: Geometry,
) -> Terms:
    """scale N."""
    return Terms(direction * group["scale"])


#: The part outside the subspace is dropped (GaLore).
NONE = Residual(_no_specs, _dropped, needs_gradient=False)
