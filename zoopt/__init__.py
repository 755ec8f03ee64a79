"""Memory-efficient optimizers for PyTorch.

Zeroth order (the memory of inference): `MeZO`, `ZOAdam`, `ZOSignSGD`, `ZOConservativeSGD`,
`ForwardGrad`, `FZOO`, `LOZO`, `SubZero`, `ZOMuon`, `HiZOO`, `ConMeZO`, `EvolutionStrategy`.
With backprop on the late layers: `Hybrid`.
Compact state: `SM3`, `AdamW`. Low-rank projection: `GaLoreAdamW`, `QGaLoreAdamW`, `Apollo`,
`ApolloMini`, `Fira`, `LDAdamW`, `Frugal`, `GaLoreAdafactor`,
`GradNormLoRP`, `OwLore`. Reparametrised layers: `zoopt.nn`. Which parameters train:
`HalfFineTuning`.
"""

from zoopt import kernels, lowrank, nn, noise
from zoopt.first_order import (
    SM3,
    AdamW,
    Apollo,
    ApolloMini,
    Fira,
    Frugal,
    GaLoreAdafactor,
    GaLoreAdamW,
    GradNormLoRP,
    LDAdamW,
    OwLore,
    QGaLoreAdamW,
    fuse_backward,
)
from zoopt.selection import HalfFineTuning
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
    "GaLoreAdafactor",
    "GaLoreAdamW",
    "GradNormLoRP",
    "HalfFineTuning",
    "HiZOO",
    "Hybrid",
    "LDAdamW",
    "MeZO",
    "OwLore",
    "QGaLoreAdamW",
    "SubZero",
    "ZOAdam",
    "ZOConservativeSGD",
    "ZOMuon",
    "ZOSignSGD",
    "fuse_backward",
    "kernels",
    "lowrank",
    "nn",
    "noise",
]
__version__ = "0.1.0"
