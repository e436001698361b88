"""`python -m flowfast.cli`."""

import sys

from flowfast.cli import main

sys.exit(main())
