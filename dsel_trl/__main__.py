"""`python -m dsel_trl` is `dsel`, so that `accelerate launch -m dsel_trl` and `torchrun -m dsel_trl` work."""

import sys

from .cli import main

sys.exit(main())
