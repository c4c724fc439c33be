"""Tests that try many histories, and judge them by models of the contract.

With ROOMKEYS_SOAK=1 in the environment they try a great many, at random.
"""

import os

#: Whether to go on for minutes.
SOAK = os.environ.get("ROOMKEYS_SOAK") == "1"
