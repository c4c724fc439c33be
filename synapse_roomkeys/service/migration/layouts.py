"""The tables with the backups in the databases of homeservers."""

import attrs

KEY_COLUMNS = """room_id, session_id,
    first_message_index, forwarded_count, is_verified, session_data"""
VERSION_COLUMNS = "user_id, version, algorithm, auth_data, deleted, etag"


@attrs.frozen
class Layout:
    """The tables of one kind of homeserver.

    A migration's queries read Synapse's tables, e2e_room_keys and
    e2e_room_keys_versions. The WITH clause derives these from other tables.

    Attributes:
        keys: the name of the table of keys.
        versions: the name of the table of versions.
        with_clause: a WITH clause in front of each query, for PostgreSQL and SQLite;
            empty for Synapse.
    """

    keys: str
    versions: str
    with_clause: str = ""

    @property
    def tables(self) -> tuple[str, str]:
        """Return the names of both tables."""
        return self.keys, self.versions


SYNAPSE = Layout("e2e_room_keys", "e2e_room_keys_versions")
