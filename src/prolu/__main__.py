"""`python -m prolu`, the same as `prolu`."""

import sys

from prolu.cli import main

sys.exit(main())
