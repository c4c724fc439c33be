"""Backed up keys of a room that a Synapse with the module purges."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from .. import blocking_http
from ..contract.base import encoded, key, wrapped
from ..servers import Synapse
from .test_synapse_start import failed_start

TABLES = "purge_room_tables_with_room_id_column"
OPTION = {"keep_keys_on_room_purge": True}
WITHOUT_TABLES = f"""
from synapse.storage.databases.main import purge_events
vars(purge_events).pop({TABLES!r}, None)
"""


def call(synapse: Synapse, token: str, method: str, path: str, body: Any = None) -> Any:
    """Send a request that succeeds, and return the answer."""
    headers = {"Authorization": f"Bearer {token}"}
    answer = blocking_http.send(method, synapse.url + path, headers, encoded(body))
    assert answer.status == 200, answer
    return answer.json


def keys_after_purge(synapse: Synapse) -> Any:
    """Back up a key of a room, purge the room, and return the keys of the backup."""
    admin = synapse.register("admin", admin=True).access_token
    room_id: str = call(synapse, admin, "POST", "/_matrix/client/v3/createRoom", {})[
        "room_id"
    ]
    base = "/_matrix/client/v3/room_keys"
    info = {"algorithm": "m.megolm_backup.v1.curve25519-aes-sha2", "auth_data": {}}
    version = call(synapse, admin, "POST", f"{base}/version", info)["version"]
    keys = f"{base}/keys?version={version}"
    call(synapse, admin, "PUT", keys, wrapped({room_id: {"session": key()}}))
    # Version 1 of this endpoint answers after the purge.
    room = f"/_synapse/admin/v1/rooms/{room_id}"
    call(synapse, admin, "DELETE", room, {"purge": True, "force_purge": True})
    return call(synapse, admin, "GET", keys)["rooms"]


@pytest.mark.parametrize("keeps", [True, False])
def test_purge(keeps: bool, tmp_path: Path) -> None:
    """With the option, a purge leaves the backed up keys of the room; without it,
    Synapse deletes them."""
    with Synapse(tmp_path, module_config=OPTION if keeps else {}) as synapse:
        assert bool(keys_after_purge(synapse)) is keeps


def test_other_internals(tmp_path: Path) -> None:
    """A Synapse that names its tables otherwise doesn't start with the option."""
    synapse = Synapse(tmp_path, module_config=OPTION, preload=WITHOUT_TABLES)
    output = failed_start(synapse)
    assert TABLES in output and "keep_keys_on_room_purge" in output
