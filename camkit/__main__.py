"""The command line as ``python -m camkit``."""

import sys

from camkit.cli import main

sys.exit(main())
