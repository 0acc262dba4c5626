"""`python -m abkd` is `abkd`."""

import sys

from abkd.cli import main

sys.exit(main())
