"""Tests of the search for leaked secrets."""

import logging
import os
from pathlib import Path
from tempfile import TemporaryDirectory

from prometheus_client import REGISTRY, Counter
from twisted.trial.unittest import SynchronousTestCase

from ..secret_search import POSTGRES_LOG, SecretSearch

TOKEN = "syt_abcdefgh"


class SecretSearchTests(SynchronousTestCase):
    """Tests of `SecretSearch`."""

    def setUp(self) -> None:
        directory = TemporaryDirectory()
        self.addCleanup(directory.cleanup)
        self.directory = Path(directory.name)
        self.log = self.directory / "output.txt"
        self.search = SecretSearch(self.directory)

    def test_a_log_record_with_a_secret_names_the_running_test(self) -> None:
        """A finding in a log record names the test that pytest runs at that time."""
        self.patch(os, "environ", {"PYTEST_CURRENT_TEST": "test_a (call)"})
        self.search.handle(logging.makeLogRecord({"msg": "no secret"}))
        self.search.handle(logging.makeLogRecord({"msg": f"token {TOKEN}"}))
        (finding,) = self.search.take_findings("test_b")
        self.assertEqual(finding, f"logged during test_a (call): token {TOKEN}")
        self.assertEqual(self.search.take_findings("test_b"), [])

    def test_a_line_of_a_log_file_is_found_once(self) -> None:
        """Only the lines that a log file has grown by are searched, unless the file
        became shorter, and each finding names the log file and the test."""
        self.log.write_text("clean\n")
        self.assertEqual(self.search.take_findings("test_a"), [])
        self.log.write_text(f"clean\n{TOKEN}1\nbegun ")
        (finding,) = self.search.take_findings("test_b")
        self.assertIn("found after test_b", finding)
        self.assertIn(str(self.log), finding)
        self.assertEqual(self.search.take_findings("test_c"), [])
        with self.log.open("a") as log:
            log.write(f"{TOKEN}2")
        (finding,) = self.search.take_findings("test_d")
        self.assertIn(f"begun {TOKEN}2", finding)
        self.log.write_text(f"{TOKEN}3\n")
        (finding,) = self.search.take_findings("test_e")
        self.assertIn(f"{TOKEN}3", finding)

    def test_the_last_search_reads_log_files_from_the_start(self) -> None:
        """The last search finds a secret in a part of a file that was overwritten."""
        self.log.write_text("the first line\n")
        self.search.take_findings("test_a")
        self.log.write_text(f"{TOKEN}\nand another line\n")
        self.assertEqual(self.search.take_findings("test_b"), [])
        (finding,) = self.search.search_all_again("the last test")
        self.assertIn(TOKEN, finding)

    def test_logs_are_searched_below_the_directory(self) -> None:
        """All log files but PostgreSQL's own are searched, in every folder."""
        folder = self.directory / "server" / "run"
        folder.mkdir(parents=True)
        for name in ("a.log", "output.txt", POSTGRES_LOG, "notes.txt"):
            (folder / name).write_text(TOKEN)
        findings = self.search.take_findings("test_a")
        self.assertEqual(len(findings), 2)
        self.assertTrue(any("a.log" in finding for finding in findings))
        self.assertTrue(any("output.txt" in finding for finding in findings))

    def test_metrics_are_searched(self) -> None:
        """A label of a metric that holds a secret is a finding."""
        counter = Counter("leaking", "A metric for this test.", ["label"])
        self.addCleanup(REGISTRY.unregister, counter)
        counter.labels(TOKEN)
        findings = self.search.take_findings("test_a")
        self.assertTrue(findings)
        self.assertIn("found after test_a in metrics", findings[0])
