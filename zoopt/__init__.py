"""Memory-efficient optimizers for PyTorch.

Zeroth order (the memory of inference): `MeZO`, `ZOAdam`, `ZOSignSGD`, `ZOConservativeSGD`,
`ForwardGrad`, `FZOO`, `LOZO`, `SubZero`, `ZOMuon`, `HiZOO`, `ConMeZO`, `EvolutionStrategy`.
With backprop on the late layers: `Hybrid`.
Compact state: `SM3`, `AdamW`. Low-rank projection: `GaLoreAdamW`, `QGaLoreAdamW`, `Apollo`,
`ApolloMini`, `Fira`, `LDAdamW`, `Frugal`.
"""

from zoopt import kernels, nn, noise
from zoopt.compact import SM3
from zoopt.fused_backward import fuse_backward
from zoopt.lowrank import (
    AdamW,
    Apollo,
    ApolloMini,
    Fira,
    Frugal,
    GaLoreAdamW,
    GradNormLoRP,
    LDAdamW,
    QGaLoreAdamW,
)
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
    "SM3",
    "AdamW",
    "Apollo",
    "ApolloMini",
    "ConMeZO",
    "EvolutionStrategy",
    "Fira",
    "ForwardGrad",
    "Frugal",
    "GaLoreAdamW",
    "GradNormLoRP",
    "HiZOO",
    "Hybrid",
    "LDAdamW",
    "MeZO",
    "QGaLoreAdamW",
    "SubZero",
    "ZOAdam",
    "ZOConservativeSGD",
    "ZOMuon",
    "ZOSignSGD",
    "fuse_backward",
    "kernels",
    "nn",
    "noise",
]
__version__ = "0.1.0"
