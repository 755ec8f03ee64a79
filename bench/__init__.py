"""Benchmarks that need the checkout. Those that work from an installation are in `zoopt.bench`.

Run them as modules from the root of the checkout: `python -m bench.convergence`.
"""

import os
from pathlib import Path

# Let OpenMP's threads sleep while they wait. If they spin, they take the processor from each other
# and from every other process. OpenMP reads this once, when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

#: The root of the checkout.
ROOT = Path(__file__).resolve().parent.parent
