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
        may_lack_auth_data: the homeserver may have lost the auth_data of a version.
    """

    keys: str
    versions: str
    with_clause: str = ""
    may_lack_auth_data: bool = False

    @property
    def tables(self) -> tuple[str, str]:
        """Return the names of both tables."""
        return self.keys, self.versions


SYNAPSE = Layout("e2e_room_keys", "e2e_room_keys_versions")
#: Dendrite since 0.10.4. The number of a version is a text in the table of keys.
#: Dendrite keeps the keys of deleted versions; the WITH clause leaves these keys out.
#: The auth_data of a deleted version reads as {}, as after a deletion by the service.
DENDRITE = Layout(
    keys="userapi_key_backups",
    versions="userapi_key_backup_versions",
    with_clause=f"""
    WITH e2e_room_keys AS (
        SELECT v.user_id, v.version, {KEY_COLUMNS}
        FROM userapi_key_backup_versions AS v JOIN userapi_key_backups AS k
            ON k.user_id = v.user_id AND k.version = CAST(v.version AS TEXT)
        WHERE v.deleted = 0
    ), e2e_room_keys_versions AS (
        SELECT user_id, version, algorithm,
            CASE WHEN deleted = 0 THEN auth_data ELSE '{{}}' END AS auth_data,
            deleted, etag
        FROM userapi_key_backup_versions
    )""",
    may_lack_auth_data=True,
)
