"""Tests that inject faults and random inputs, and compare the results with models.

With ROOMKEYS_SOAK=1 in the environment, the tests run far more cases, with random
seeds.
"""

import os

#: Whether the environment asks for the long runs (ROOMKEYS_SOAK=1).
SOAK = os.environ.get("ROOMKEYS_SOAK") == "1"
