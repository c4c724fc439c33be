"""``SECURITY.md`` names tests, and they are there."""

import re
from pathlib import Path

from twisted.trial.unittest import SynchronousTestCase

TESTS = Path(__file__).parents[1]
#: A file, and the tests in it that are named.
NAMED = re.compile(r"`([\w/]+\.py)`(?::((?:,?\s+`\w+`)+))?")
#: Fewer means that they aren't found.
LEAST_NAMES = 30


class SecurityTests(SynchronousTestCase):
    """The tables of who is kept from what."""

    def test_the_tests_are_there(self) -> None:
        """Under the name and in the file that a row says."""
        found = 0
        for path, names in NAMED.findall((TESTS.parent / "SECURITY.md").read_text()):
            source = (TESTS / path).read_text()
            for name in re.findall(r"\w+", names):
                self.assertIn(f"def {name}(", source, path)
                found += 1
        self.assertGreaterEqual(found, LEAST_NAMES)
