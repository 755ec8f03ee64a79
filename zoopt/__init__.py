"""Memory-efficient optimizers for PyTorch.

`zoopt.optimizers()` lists them, `zoopt.optimizer(name, params, ...)` makes one by name, and each
is a class of its own: `zoopt.MeZO`, `zoopt.GaLoreAdamW`, `zoopt.SM3` ... By family:

    zeroth-order    the memory of inference, gradients estimated from forward passes
    low-rank        Adam's moments in a subspace of each matrix
    compact         moments in few bytes, or one for each row and column

Reparametrised layers: `zoopt.nn`. Which parameters train: `HalfFineTuning`.
"""

from zoopt import first_order, kernels, lowrank, nn, noise, selection, zeroth_order
from zoopt.first_order import *  # noqa: F403
from zoopt.registry import optimizer, optimizers
from zoopt.selection import *  # noqa: F403
from zoopt.trajectory import replay
from zoopt.version import __version__ as __version__
from zoopt.zeroth_order import *  # noqa: F403

__all__ = ["kernels", "lowrank", "nn", "noise", "optimizer", "optimizers", "replay"]
__all__ += first_order.__all__
__all__ += selection.__all__
__all__ += zeroth_order.__all__
