"""Citus: the state of the tables in a cluster, and their distribution."""

import attrs

from . import statements
from .transactions import Transaction

#: Returns whether the database has the extension Citus.
_FIND_EXTENSION = "SELECT to_regclass('pg_catalog.pg_dist_partition') IS NOT NULL"
#: Returns true at the coordinator, the node of group 0.
_FIND_ROLE = "SELECT groupid = 0 FROM pg_dist_local_group"
#: Returns the names of the distributed tables and of the reference tables (replication
#: model t) among those of `ALL_TABLES`. Citus lists other local tables as well.
_FIND_DISTRIBUTED = f"""
    SELECT c.relname FROM pg_dist_partition AS p JOIN pg_class AS c
    ON c.oid = p.logicalrelid
    WHERE c.relname IN {statements.ALL_TABLES} AND pg_table_is_visible(c.oid)
    AND (p.partmethod = 'h' OR p.repmodel = 't')"""

#: Returns the addresses of the nodes on which a commit of this role doesn't wait for
#: the disk. Nodes that are down aren't listed.
_FIND_ASYNCHRONOUS = """
    SELECT n.nodename || ':' || n.nodeport
    FROM run_command_on_all_nodes('SHOW synchronous_commit') AS r
    JOIN pg_dist_node AS n USING (nodeid)
    WHERE r.success AND r.result = 'off' ORDER BY 1"""

#: The tables that the operator distributes. The plugin distributes its own tables.
_FIRST = tuple(statements.TABLES)
#: Without this setting, Citus can't distribute a table in the transaction that has
#: created the table.
_ONE_CONNECTION = "SET LOCAL citus.multi_shard_modify_mode TO 'sequential'"
#: By table without a unique index, the statement by which logical replication finds a
#: changed row: by all columns. Citus moves shards between nodes by logical replication.
_IDENTIFY_ROWS = {
    table: f"ALTER TABLE {table} REPLICA IDENTITY FULL"
    for table in ("roomkeys_changes", "roomkeys_replaced")
}
#: By table of the plugin, the statement that distributes the table with all rows. The
#: schema number is copied to each node: a process can start while other nodes are down.
#: The leases and the tasks are on one node each, because a write to a copied row needs
#: all nodes.
_DISTRIBUTE = {
    **{
        table: f"""
    SELECT create_distributed_table('{table}', 'user_id',
        colocate_with => 'e2e_room_keys_versions')"""
        for table in statements.OWN_TABLES
    },
    "roomkeys_schema": "SELECT create_reference_table('roomkeys_schema')",
    "roomkeys_leases": """
    SELECT create_distributed_table('roomkeys_leases', 'name',
        colocate_with => 'none', shard_count => 1)""",
    "roomkeys_tasks": """
    SELECT create_distributed_table('roomkeys_tasks', 'task_id',
        colocate_with => 'none', shard_count => 1)""",
}


@attrs.frozen
class Cluster:
    """The cluster that a database belongs to.

    Attributes:
        is_coordinator: Whether the node can create and change tables.
        distributed: the names of the plugin's distributed tables.
    """

    is_coordinator: bool
    distributed: frozenset[str]

    @property
    def is_distributed(self) -> bool:
        """Whether the homeserver's tables are distributed."""
        return self.distributed.issuperset(_FIRST)

    @property
    def undistributed(self) -> list[str]:
        """The plugin's local tables, if the homeserver's tables are distributed."""
        if not self.is_distributed:
            return []
        return [t for t in statements.OWN_TABLES if t not in self.distributed]

    def find_problem(self) -> str | None:
        """Return a sentence for the operator if the service can't start on these
        tables, else None."""
        if self.is_coordinator:
            first = self.distributed.intersection(_FIRST)
            if first and not self.is_distributed:
                (missing,) = set(_FIRST) - first
                return (
                    f"the table {missing} isn't distributed by Citus, unlike the other"
                    " one: distribute it as docs/scaling.rst describes"
                )
        elif missing_tables := sorted(set(statements.ALL_TABLES) - self.distributed):
            return (
                "it is a worker of Citus, on which these tables aren't distributed:"
                f" {', '.join(missing_tables)}. Tables made here would be seen by this"
                " worker alone. Start the service at the coordinator first, which makes"
                " and changes tables, then distribute e2e_room_keys and"
                " e2e_room_keys_versions as docs/scaling.rst describes"
            )
        return None


def find_asynchronous_nodes(txn: Transaction) -> list[str]:
    """Return the addresses of the nodes on which a commit returns before it is on disk.
    The setting of a transaction doesn't reach other nodes."""
    txn.execute(_FIND_ASYNCHRONOUS)
    return [address for (address,) in txn.fetchall()]


def find_cluster(txn: Transaction) -> Cluster | None:
    """Return the Citus cluster of a PostgreSQL database; None if Citus isn't
    installed."""
    txn.execute(_FIND_EXTENSION)
    if txn.fetchall() != [(True,)]:
        return None
    txn.execute(_FIND_ROLE)
    ((is_coordinator,),) = txn.fetchall()
    txn.execute(_FIND_DISTRIBUTED)
    return Cluster(is_coordinator, frozenset(name for (name,) in txn.fetchall()))


def distribute_own_tables(txn: Transaction, cluster: Cluster) -> None:
    """Distribute the plugin's tables after the homeserver's tables, at the
    coordinator."""
    txn.execute(_ONE_CONNECTION)
    for table in cluster.undistributed:
        txn.execute(_DISTRIBUTE[table])
    for table in cluster.undistributed:
        if table in _IDENTIFY_ROWS:
            txn.execute(_IDENTIFY_ROWS[table])
