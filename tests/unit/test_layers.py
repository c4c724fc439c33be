"""The structure: imports run downwards, and all SQL names a user."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import attrs
from twisted.trial.unittest import SynchronousTestCase

import synapse_roomkeys
from synapse_roomkeys.storage import postgres_statements, sqlite_statements, sweeps
from synapse_roomkeys.storage import statements as shared
from synapse_roomkeys.storage.values import DownloadStatements

PACKAGE = Path(synapse_roomkeys.__file__).parent
#: The modules from the lowest to the highest; each imports only earlier modules.
ORDER = [
    "version",
    "describe",
    "inline",
    "errors",
    "types",
    "metrics",
    "outages",
    "clock",
    "merge",
    "throttling",
    "identifiers",
    "json_text",
    "encoding",
    "refusals",
    "wire",
    "fairness",
    "pages",
    "config",
    "storage.statements",
    "storage.faults",
    "storage.causes",
    "storage.transactions",
    "storage.citus",
    "storage.values",
    "storage.engine",
    "storage.sqlite_statements",
    "storage.sqlite_engine",
    "storage.postgres_settings",
    "storage.postgres_statements",
    "storage.postgres_engine",
    "storage.schema",
    "storage.arguments",
    "storage.pool",
    "storage.retries",
    "storage.rows",
    "storage.counts",
    "storage.measuring",
    "storage.record",
    "storage.uploads",
    "storage.downloads",
    "storage.versions",
    "storage.undo",
    "storage.store",
    "storage.leases",
    "storage.tasks",
    "storage.sweeps",
    "storage.overview",
    "storage.erasure",
    "storage.inspection",
    "storage.imports",
    "storage",
    "background",
    "sweeper",
    "replacements",
    "handler",
    "admin",
    "admin.facts",
    "admin.survey",
    "admin.removal",
    "admin.transfer_file",
    "admin.backend",
    "admin.runner",
    "admin.handler",
    "rest.host",
    "rest.resource",
    "rest.streaming",
    "rest.room_keys",
    "rest.export",
    "rest.admin_requests",
    "rest.admin",
    "rest",
    "request_queue",
    "homeserver",
    "homeserver_answers",
    "claims",
    "whoami",
    "synapse_auth",
    "synapse_module",
    "service",
    "service.endpoints",
    "service.forwarded",
    "service.config",
    "service.migration.values",
    "service.migration.report",
    "service.migration.decisions",
    "service.migration.copy_text",
    "service.migration.layouts",
    "service.migration.side",
    "service.migration.postgres_side",
    "service.migration.sqlite_side",
    "service.migration.run",
    "service.migration.synapse_config",
    "service.migration.dendrite_config",
    "service.migration",
    "service.logs",
    "service.files",
    "service.request",
    "service.site",
    "service.status",
    "service.readiness",
    "service.admin_auth",
    "service.app",
    "service.check",
    "tools",
    "tools.session",
    "tools.accounts",
    "tools.output",
    "tools.owners",
    "tools.history",
    "tools.removal",
    "tools.problems",
    "tools.verify",
    "tools.transfer_body",
    "tools.exports",
    "tools.imports",
    "tools.arguments",
    "tools.read_commands",
    "tools.write_commands",
    "service.cli",
    "service.__main__",
    "",
]
#: By the first part of an import's name, the modules with this import.
KNOWN_BY = {
    "synapse": {"synapse_module"},
    "prometheus_client": {"metrics", "background", "service.status"},
    "psycopg2": {
        *("storage.arguments", "storage.postgres_engine"),
        "service.migration.postgres_side",
    },
    "sqlite3": {
        *("storage.pool", "storage.sqlite_engine", "storage.faults"),
        "service.migration.sqlite_side",
    },
    "canonicaljson": {"rest.resource"},
    "json": {
        *("encoding", "identifiers", "json_text", "refusals", "wire"),
        *("storage.record", "storage.tasks", "storage.sqlite_engine", "service.logs"),
        *("admin.facts", "admin.transfer_file", "tools.output"),
        *("tools.transfer_body", "tools.imports"),
        *("service.migration.decisions", "service.migration.sqlite_side"),
    },
    "msgspec": {
        *("types", "encoding", "json_text", "refusals", "wire"),
        *(
            "config",
            "request_queue",
            "homeserver",
            "homeserver_answers",
            "whoami",
            "service.config",
            "rest.export",
            "rest.admin_requests",
            "admin.transfer_file",
            "tools.accounts",
        ),
    },
    "treq": {"homeserver"},
    "yaml": {"service.config"},
}


#: Statements without a row of a user.
NAMELESS = (
    "statements.COLUMNS",
    "sqlite_statements.BEGIN_WRITE",
    "postgres_statements.FETCH_PAGE",
    "postgres_statements.SEPARATOR",
)
#: Minimum number of statements. With fewer, the search for statements is broken.
LEAST_STATEMENTS = 50


def module_name(path: Path) -> str:
    """The name of a module, below the package's."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def imports(path: Path) -> Iterator[tuple[str, bool]]:
    """Yield the imports of a module, at any place in the module, and whether the import
    is of this package."""
    is_package = path.name == "__init__.py"
    here = [part for part in module_name(path).split(".") if part]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, False) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.module or "", False
        elif isinstance(node, ast.ImportFrom):
            up = node.level - is_package
            base = here[: len(here) - up] if up else here
            names = [node.module] if node.module else [a.name for a in node.names]
            yield from ((".".join([*base, str(name)]), True) for name in names)


class LayerTests(SynchronousTestCase):
    """The order of the modules."""

    def test_every_module_has_a_place(self) -> None:
        """A new module is put somewhere in the order."""
        found = {module_name(path) for path in PACKAGE.rglob("*.py")}
        self.assertEqual(found, set(ORDER))

    def test_imports_run_downwards(self) -> None:
        """A module imports only lower modules."""
        for path in PACKAGE.rglob("*.py"):
            importer = module_name(path)
            for imported, own in imports(path):
                if own:
                    self.assertLess(
                        ORDER.index(imported),
                        ORDER.index(importer),
                        (importer, imported),
                    )

    def test_what_few_may_know(self) -> None:
        """Synapse, each driver and each encoder are imported in few modules."""
        for path in PACKAGE.rglob("*.py"):
            for imported, own in imports(path):
                knowing = KNOWN_BY.get(imported.partition(".")[0])
                if knowing is not None and not own:
                    self.assertIn(module_name(path), knowing, imported)

    def test_the_package_needs_no_synapse(self) -> None:
        """Without Synapse, the package can be imported, and the module's error names
        Synapse."""
        code = (
            "import sys; sys.modules['synapse'] = None; import synapse_roomkeys as s;"
            "s.register_servlets; s.E2eRoomKeysHandler\n"
            "try: s.RoomKeysModule\n"
            "except ImportError as e: print(e)"
        )
        done = subprocess.run(
            [sys.executable, "-c", code],
            cwd=PACKAGE.parent,
            capture_output=True,
            text=True,
            check=False,
        )
        self.assertIn("synapse", done.stdout, done.stderr)


def statements() -> dict[str, str]:
    """Return all statements about tables of keys, by name."""
    found: dict[str, str] = {}
    for module in (shared, sqlite_statements, postgres_statements):
        place = module.__name__.rpartition(".")[2]
        for name, value in vars(module).items():
            if not name.isupper() or name.startswith("_"):
                continue
            if isinstance(value, str):
                found[f"{place}.{name}"] = value
            elif isinstance(value, DownloadStatements):
                for part, statement in attrs.asdict(value).items():
                    found[f"{place}.{name}.{part}"] = statement
    for name in NAMELESS:
        del found[name]
    return found


class StatementTests(SynchronousTestCase):
    """The rules for every statement."""

    def test_each_use_of_a_table_names_the_user(self) -> None:
        """Every part of a statement names the user of the rows."""
        self.assertGreaterEqual(len(statements()), LEAST_STATEMENTS)
        table = re.compile(r"(?:FROM|JOIN|UPDATE|INTO|LATERAL)\s+(\w*room_?keys\w*)")
        for name, statement in statements().items():
            tables = len(table.findall(statement))
            users = len(re.findall(r"user_id = :user_id", statement))
            users += len(re.findall(r"INTO \w+\s*\(\s*user_id,", statement))
            self.assertGreater(tables, 0, name)
            self.assertEqual(tables, users, f"{name}: {statement}")

    def test_each_conflict_target_names_the_user(self) -> None:
        """A conflict is looked for among the user's own rows."""
        for name, statement in statements().items():
            for target in re.findall(r"ON CONFLICT \((.*?)\)", statement):
                self.assertEqual(target.split(", ")[0], "user_id", name)

    def test_citus_can_send_each_statement_to_one_shard(self) -> None:
        """No INSERT stands in a statement with a WITH, an INSERT ... SELECT takes the
        user from a table, and no cursor reads distributed tables."""
        texts = {n: s for n, s in statements().items() if "sqlite_statements" not in n}
        texts |= {n: s for n, s in vars(sweeps).items() if isinstance(s, str)}
        for name, text in texts.items():
            for part in text.split(";"):
                if "INSERT INTO" in part:
                    self.assertNotRegex(part, r"\bWITH\b(?! ORDINALITY)", name)
                    self.assertNotRegex(part, r"\)\s+SELECT\s+[:']", name)
            if ".DISTRIBUTED_DOWNLOADS." in name:
                self.assertNotIn("DECLARE", text, name)

    def test_marks_are_parameters(self) -> None:
        """No parameter stands in a literal, and no statement has a mark of psycopg2 or
        a question mark, because Synapse translates question marks."""
        for name, statement in statements().items():
            self.assertNotIn("%", statement, name)
            self.assertNotIn("?", statement, name)
            for literal in re.findall(r"'[^']*'", statement):
                self.assertNotRegex(literal, ":[a-z_]", name)
