"""The files around the code agree with each other."""

from pathlib import Path

from twisted.trial.unittest import SynchronousTestCase

ROOT = Path(__file__).parents[2]
COMMAND = "python3 -m venv .venv && .venv/bin/pip -q install tox && .venv/bin/tox"


class RepositoryTests(SynchronousTestCase):
    """What a newcomer is told to run is what decides."""

    def test_the_readmes_command_is_the_one_that_decides(self) -> None:
        """README, CONTRIBUTING and .ci/run have the same command."""
        for name in ("README.rst", "CONTRIBUTING.rst", ".ci/run"):
            lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
            self.assertIn(COMMAND, [line.strip() for line in lines], name)
