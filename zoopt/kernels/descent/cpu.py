"""The operations on the CPU: numba computes the sums of directions, and torch the rest."""

from __future__ import annotations

import functools

from zoopt.kernels.descent import reference
from zoopt.kernels.descent.reference import small
from zoopt.kernels.noise.cpu import weighted_sum

__all__ = ["curve", "descend", "energy", "small", "turn"]

descend = functools.partial(reference.descend, sums=weighted_sum)
curve = functools.partial(reference.curve, sums=weighted_sum)
turn = functools.partial(reference.turn, sums=weighted_sum)
energy = functools.partial(reference.energy, sums=weighted_sum)
