"""`python -m gatedadapters`."""

import sys

from gatedadapters.cli import main

sys.exit(main())
