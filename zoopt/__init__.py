"""Memory-efficient optimizers for PyTorch.

Zeroth order (the memory of inference): `MeZO`, `ZOAdam`, `ZOSignSGD`, `ZOConservativeSGD`,
`ForwardGrad`, `FZOO`, `LOZO`, `SubZero`, `ZOMuon`, `HiZOO`, `ConMeZO`.
"""

from zoopt import kernels, noise
from zoopt.zeroth_order import (
    FZOO,
    LOZO,
    ConMeZO,
    ForwardGrad,
    HiZOO,
    MeZO,
    SubZero,
    ZOAdam,
    ZOConservativeSGD,
    ZOMuon,
    ZOSignSGD,
)

__all__ = [
    "FZOO",
    "LOZO",
    "ConMeZO",
    "ForwardGrad",
    "HiZOO",
    "MeZO",
    "SubZero",
    "ZOAdam",
    "ZOConservativeSGD",
    "ZOMuon",
    "ZOSignSGD",
    "kernels",
    "noise",
]
__version__ = "0.1.0"
