"""How an update uses directions: the shape of a displacement, and the rule for the estimate."""

from __future__ import annotations

import dataclasses
from typing import Literal

ShapeKind = Literal["plain", "small", "kept", "scaled", "cone"]
RuleKind = Literal["none", "momentum", "sign", "adam"]


@dataclasses.dataclass(frozen=True)
class Shape:
    """How a sum s = sum_j a_j z_j becomes a displacement, element by element:

        plain    s
        small    s where |theta| <= beside, one float32 number per tensor; elsewhere 0
        kept     s where beside is true; elsewhere 0
        scaled   s / sqrt(beside), float32
        cone     s + radial beside, float32

    Attributes:
        radial: the factor of `beside` in theta's displacement, for a cone.
        estimate: the factor of `beside` in the estimate, for a cone.
    """

    kind: ShapeKind = "plain"
    radial: float = 0.0
    estimate: float = 0.0


@dataclasses.dataclass(frozen=True)
class Rule:
    """The update of theta for an estimate g. The rule's `numbers` are in brackets, in order:

    none       nothing
    momentum   first <- a first + g;  b first                                       (a, b)
    sign       a sign(g)                                                            (a,)
    adam       first <- b1 first + c1 g,  second <- b2 second + c2 g^2
               a first / (sqrt(second / c) + eps)               (b1, c1, b2, c2, c, a, eps)
    """

    kind: RuleKind = "none"
    numbers: tuple[float, ...] = ()

    @property
    def states(self) -> int:
        """How many state tensors the rule has."""
        return {"none": 0, "momentum": 1, "sign": 0, "adam": 2}[self.kind]
