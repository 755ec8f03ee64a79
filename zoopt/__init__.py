"""Memory-efficient optimizers for PyTorch.

Zeroth order (the memory of inference): `MeZO`, `ZOAdam`, `ZOSignSGD`, `ZOConservativeSGD`,
`ForwardGrad`, `FZOO`, `LOZO`, `SubZero`, `ZOMuon`, `HiZOO`, `ConMeZO`, `EvolutionStrategy`.
With backprop on the late layers: `Hybrid`.
Compact state: `AdamW`. Low-rank projection: `GaLoreAdamW`.
"""

from zoopt import kernels, noise
from zoopt.lowrank import AdamW, GaLoreAdamW
from zoopt.zeroth_order import (
    FZOO,
    LOZO,
    ConMeZO,
    EvolutionStrategy,
    ForwardGrad,
    HiZOO,
    Hybrid,
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
    "AdamW",
    "ConMeZO",
    "EvolutionStrategy",
    "ForwardGrad",
    "GaLoreAdamW",
    "HiZOO",
    "Hybrid",
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
