"""Tests that the tests named in ``SECURITY.md`` exist."""

import re
from pathlib import Path

from twisted.trial.unittest import SynchronousTestCase

TESTS = Path(__file__).parents[1]
#: A file, and the names of tests in that file.
NAMED = re.compile(r"`([\w/]+\.py)`(?::((?:,?\s+`\w+`)+))?")
#: If fewer names are found, `NAMED` no longer matches the format of the tables.
LEAST_NAMES = 30


class SecurityTests(SynchronousTestCase):
    """Tests of the tables in ``SECURITY.md``."""

    def test_every_named_test_exists(self) -> None:
        """Each test that a row names is defined in the file that the row names."""
        found = 0
        for path, names in NAMED.findall((TESTS.parent / "SECURITY.md").read_text()):
            source = (TESTS / path).read_text()
            for name in re.findall(r"\w+", names):
                self.assertIn(f"def {name}(", source, path)
                found += 1
        self.assertGreaterEqual(found, LEAST_NAMES)
