"""`python -m bench.pretrain`."""

import sys

from bench.pretrain.command import main

sys.exit(main())
