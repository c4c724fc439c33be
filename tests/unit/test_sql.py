"""SQL text comes from the source alone; values from outside are parameters."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from twisted.trial.unittest import SynchronousTestCase

import synapse_roomkeys

PACKAGE = Path(synapse_roomkeys.__file__).parent
#: Calls whose first argument is SQL.
CALLS = {
    "execute",
    "execute_all",
    "_execute",
    "_stream",
    "executemany",
    "copy_expert",
    "executescript",
}
#: Names of further sources of statements: the modules of statements, attributes of an
#: engine, an engine's statements of a module, the settings of a transaction, and the
#: tables and users of a migration.
SOURCES = {
    *("statements", "sql", "tables", "count_keys_and_bytes", "user_sizes"),
    *("key_sizes", "settings", "_limits", "_layout", "_of_users", "_statements"),
}
#: Functions that return a statement of the sources.
GIVEN_BY = {"select", "saving", "_read_files"}
#: Functions that pass their statement on.
FORWARDERS = {"execute", "execute_all", "_execute", "_stream"}
#: Minimum number of calls in the package. With fewer, the search for calls is broken.
LEAST_CALLS = 50
_Binding = ast.Assign | ast.AugAssign | ast.NamedExpr


def leaves(node: ast.expr) -> Iterator[ast.expr]:
    """Yield the parts of a statement."""
    if isinstance(node, ast.JoinedStr):
        for part in node.values:
            yield from leaves(
                part.value if isinstance(part, ast.FormattedValue) else part
            )
    elif isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        yield from leaves(node.left)
        yield from leaves(node.right)
    elif isinstance(node, ast.IfExp):
        yield from leaves(node.body)
        yield from leaves(node.orelse)
    elif isinstance(node, ast.Tuple | ast.List):
        for part in node.elts:
            yield from leaves(part)
    elif (
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr in ("format", "replace", "items", "join")
    ):
        yield from leaves(node.func.value)
        for argument in (*node.args, *(word.value for word in node.keywords)):
            yield from leaves(argument)
    elif isinstance(node, ast.Subscript | ast.Starred):
        yield from leaves(node.value)
    elif (
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id in ("max", "to_pyformat")
    ):
        yield from leaves(node.args[0])
    else:
        yield node


def bindings(function: ast.AST, name: str) -> Iterator[ast.expr | None]:
    """Yield the values bound to a name in a function; None for a parameter."""
    for node in ast.walk(function):
        if isinstance(node, ast.arg) and node.arg == name:
            yield None
        elif isinstance(node, _Binding) and _is_in(name, node):
            yield node.value
        elif isinstance(node, ast.For | ast.comprehension) and _is_in(name, node):
            yield node.iter


def _is_in(
    name: str,
    node: _Binding | ast.For | ast.comprehension,
) -> bool:
    """Return whether a name is among the bound names."""
    targets = node.targets if isinstance(node, ast.Assign) else [node.target]
    found = (part for target in targets for part in ast.walk(target))
    return any(isinstance(part, ast.Name) and part.id == name for part in found)


def faults(function: ast.FunctionDef, node: ast.expr) -> Iterator[str]:
    """Yield the parts of a statement from outside the source."""
    for leaf in leaves(node):
        if isinstance(leaf, ast.Constant):
            continue
        if isinstance(leaf, ast.Name) and leaf.id.isupper():
            continue
        names = {n.id for n in ast.walk(leaf) if isinstance(n, ast.Name)}
        names |= {n.attr for n in ast.walk(leaf) if isinstance(n, ast.Attribute)}
        if isinstance(leaf, ast.Attribute) and names & SOURCES:
            continue
        if isinstance(leaf, ast.Call) and names & GIVEN_BY:
            continue
        bound = list(bindings(function, leaf.id)) if isinstance(leaf, ast.Name) else []
        if not bound:
            yield f"{function.name}: {ast.unparse(leaf)}"
        for value in bound:
            if value is not None:
                yield from faults(function, value)
            elif function.name not in FORWARDERS:
                yield f"{function.name}({ast.unparse(leaf)})"


def statements(tree: ast.AST) -> Iterator[tuple[ast.FunctionDef, ast.expr]]:
    """Yield the function and the statement of each call that runs SQL."""
    for function in ast.walk(tree):
        if not isinstance(function, ast.FunctionDef):
            continue
        for node in ast.walk(function):
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Attribute)
                and node.func.attr in CALLS
            ):
                yield function, node.args[0]


def faults_of(source: str) -> list[str]:
    """Return the faults of the statements in a module."""
    found = statements(ast.parse(source))
    return [fault for function, node in found for fault in faults(function, node)]


class ParameterTests(SynchronousTestCase):
    """The arguments of ``execute``."""

    def test_statements_are_constants(self) -> None:
        """No statement of the package has a part from outside the source."""
        calls = 0
        for path in PACKAGE.rglob("*.py"):
            source = path.read_text()
            calls += len(list(statements(ast.parse(source))))
            self.assertEqual(faults_of(source), [], path)
        self.assertGreaterEqual(calls, LEAST_CALLS)

    def test_a_value_in_a_statement_is_found(self) -> None:
        """The test finds a value in a statement in each spelling."""
        for body in (
            "txn.execute(f'SELECT {user_id}')",
            "txn.execute('SELECT ' + user_id)",
            "txn.execute('SELECT %s' % user_id)",
            "txn.execute('SELECT {}'.format(user_id))",
            "txn.execute(statements.KEYS.format(user=user_id))",
            "txn.execute(statements.KEYS.replace('?', user_id))",
            "txn.execute(user_id)",
            "txn.execute(self.statement)",
            "txn.execute(make(user_id))",
            "txn.executemany(f'{COLUMNS} {user_id}', rows)",
            "s = statements.KEYS\n s += user_id\n txn.execute(s)",
            "s = f'SELECT {user_id}'\n txn.execute(s)",
            "for s in user_id.split():\n  txn.execute(s)",
        ):
            source = f"def find(self, txn, user_id, rows):\n {body}\n"
            self.assertEqual(len(faults_of(source)), 1, body)
        for body in (
            "txn.execute(statements.KEYS, (user_id,))",
            "txn.execute('SELECT 1')",
        ):
            self.assertEqual(faults_of(f"def find(txn, user_id):\n {body}\n"), [], body)
