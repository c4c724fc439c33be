"""Tests that the files around the code agree."""

from pathlib import Path

from twisted.trial.unittest import SynchronousTestCase

ROOT = Path(__file__).parents[2]
COMMAND = "python3 -m venv .venv && .venv/bin/pip -q install tox && .venv/bin/tox"


class RepositoryTests(SynchronousTestCase):
    """Tests of the documented command that decides whether a change is good."""

    def test_readme_contributing_and_ci_run_have_one_command(self) -> None:
        """README, CONTRIBUTING and .ci/run have the same command."""
        for name in ("README.rst", "CONTRIBUTING.rst", ".ci/run"):
            lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
            self.assertIn(COMMAND, [line.strip() for line in lines], name)
