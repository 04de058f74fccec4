"""``python -m thence`` and ``torchrun -m thence`` are ``thence``."""

import sys

from thence.cli import main

sys.exit(main())
