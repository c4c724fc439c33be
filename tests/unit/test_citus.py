"""Citus: the tables at the start of the service, and the timeouts of statements."""

from __future__ import annotations

from typing import Any

import psycopg2.errors
from twisted.trial.unittest import SynchronousTestCase

from synapse_roomkeys.storage import postgres_settings as settings
from synapse_roomkeys.storage import statements
from synapse_roomkeys.storage.citus import Cluster, find_cluster
from synapse_roomkeys.storage.faults import Fault
from synapse_roomkeys.storage.postgres_engine import PostgresEngine

HOMESERVERS_TABLES = frozenset(statements.TABLES)
ALL_TABLES = frozenset(statements.ALL_TABLES)


class StubTransaction:
    """A transaction that returns given rows, and notes the statements in ``sent``.

    Attributes:
        answers: the rows of each statement, in order.
    """

    description = None
    rowcount = 0

    def __init__(self, *answers: list[tuple[Any, ...]]) -> None:
        self._answers = list(answers)
        self.sent: list[str] = []

    def execute(self, statement: str, parameters: Any = ()) -> None:
        """As `Transaction.execute`."""
        self.sent.append(statement)

    def fetchone(self) -> Any:
        """As `Transaction.fetchone`."""
        return self.fetchall()[0]

    def fetchall(self) -> list[tuple[Any, ...]]:
        """As `Transaction.fetchall`."""
        return self._answers.pop(0)


class ClusterTests(SynchronousTestCase):
    """The state of a cluster at the start of the service."""

    def test_a_database_without_citus_is_no_cluster(self) -> None:
        """PostgreSQL without the extension takes one query."""
        txn = StubTransaction([(False,)])
        self.assertIsNone(find_cluster(txn))
        self.assertEqual(len(txn.sent), 1)

    def test_the_coordinator_starts_on_local_tables_or_distributed_ones(self) -> None:
        """The coordinator makes the tables, and therefore starts without tables."""
        for distributed in (frozenset[str](), HOMESERVERS_TABLES, ALL_TABLES):
            self.assertIsNone(Cluster(True, distributed).find_problem())

    def test_one_distributed_table_of_two_is_refused(self) -> None:
        """The refusal names the table that the operator forgot."""
        for table in HOMESERVERS_TABLES:
            problem = Cluster(True, frozenset({table})).find_problem()
            assert problem is not None
            (forgotten,) = HOMESERVERS_TABLES - {table}
            self.assertIn(f"the table {forgotten} isn't distributed", problem)

    def test_a_worker_starts_only_on_distributed_tables(self) -> None:
        """A local table of a worker would hold separate backups."""
        self.assertIsNone(Cluster(False, ALL_TABLES).find_problem())
        for table in ALL_TABLES:
            problem = Cluster(False, ALL_TABLES - {table}).find_problem()
            assert problem is not None
            self.assertIn(f"aren't distributed: {table}.", problem)

    def test_own_tables_follow_the_homeservers(self) -> None:
        """The plugin's tables are distributed once both of the homeserver's are."""
        own = list(statements.OWN_TABLES)
        self.assertEqual(Cluster(True, frozenset()).undistributed, [])
        self.assertEqual(Cluster(True, HOMESERVERS_TABLES).undistributed, own)
        but_one = Cluster(True, ALL_TABLES - {own[1]})
        self.assertEqual(but_one.undistributed, [own[1]])


class TimeoutTests(SynchronousTestCase):
    """The longest time of a statement."""

    def setUp(self) -> None:
        self.engine = PostgresEngine()
        rows: list[tuple[Any, ...]] = [(table,) for table in ALL_TABLES]
        self.distributed = StubTransaction([(True,)], [(True,)], rows)
        self.timeout = psycopg2.errors.QueryCanceled()
        self.timeout.__setstate__({"pgcode": "57014"})

    def sent(self) -> str:
        """Return the first message of a transaction."""
        txn = StubTransaction()
        self.engine.prepare(txn).execute("SELECT 1")
        return txn.sent[0]

    def test_statements_of_a_single_server_have_no_timeout_of_ours(self) -> None:
        """On a single server, the operator decides by statement_timeout."""
        self.assertNotIn("statement_timeout", self.sent())
        self.assertIs(self.engine.judge(self.timeout), Fault.PASSING)
        self.assertNotIn("statement_timeout", self.sent())

    def test_a_timeout_shortens_the_next_ones(self) -> None:
        """After a timeout on distributed tables, the next statements have a shorter
        timeout: a hanging node holds fewer connections."""
        self.engine.find_cluster(self.distributed)
        normal = f"statement_timeout TO {1000 * settings.STATEMENT_SECONDS};"
        short = f"statement_timeout TO {1000 * settings.SUSPICIOUS_STATEMENT_SECONDS};"
        self.assertIn(normal, self.sent())
        self.assertIs(self.engine.judge(self.timeout), Fault.LOCKED)
        self.assertIn(short, self.sent())
        unreachable = psycopg2.errors.ConnectionFailure()
        unreachable.__setstate__({"pgcode": "08006"})
        self.assertIs(self.engine.judge(unreachable), Fault.LOCKED)
        self.patch(settings, "SUSPICION_SECONDS", 0)
        self.assertIn(normal, self.sent())
