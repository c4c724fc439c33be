"""``python -m synapse_roomkeys.service``."""

import sys

from .cli import main

sys.exit(main())
