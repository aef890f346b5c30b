"""`python -m leansd.cli`, the same as the console script."""

import sys

from leansd.cli import main

sys.exit(main())
