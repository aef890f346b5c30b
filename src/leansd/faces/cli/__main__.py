"""`python -m leansd.faces.cli`, the same as the console script."""

import sys

from leansd.faces.cli import main

sys.exit(main())
