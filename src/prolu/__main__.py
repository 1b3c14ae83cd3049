"""`python -m prolu`, the same as `prolu`."""

import sys

from prolu.cli.entry_point import main

sys.exit(main())
