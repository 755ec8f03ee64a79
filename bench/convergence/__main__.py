"""`python -m bench.convergence`."""

import sys

from bench.convergence.command import main

sys.exit(main())
