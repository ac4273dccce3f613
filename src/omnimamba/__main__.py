"""`python -m omnimamba`, which `torchrun -m omnimamba` needs."""

import sys

from omnimamba.cli import main

sys.exit(main())
