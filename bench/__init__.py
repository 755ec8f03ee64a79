"""Benchmarks that need the checkout; those that an installation has are in `zoopt.bench`.

Each is run as a module from the checkout's root: `python -m bench.convergence`.
"""

import os
from pathlib import Path

# OpenMP's threads sleep while they wait. Spinning, they take the processor from each other and
# from every other process. OpenMP reads this once, when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

#: The checkout.
ROOT = Path(__file__).resolve().parent.parent
