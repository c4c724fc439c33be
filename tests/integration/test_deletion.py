"""The deletion of a large backup on SQLite, and what others feel of it."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Generator, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from pytest_twisted import blockon
from twisted.internet.defer import Deferred, inlineCallbacks

from synapse_roomkeys.storage.sqlite_engine import DELETED_AT_ONCE

from ..contract import Client
from ..contract.base import accepted, key, version_path
from ..memory import StubAuth
from ..sites import Backend, OwnSite

Steps = Generator[Deferred[Any], Any, None]
KEYS = 10 * DELETED_AT_ONCE
ADD_KEYS = """
    WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < ?)
    INSERT INTO e2e_room_keys
    SELECT ?, '!room', i, ?, 0, 0, 0, '"' || printf('%.900c', 'x') || '"' FROM n"""


@pytest.fixture
def sites(tmp_path: Path) -> Iterator[tuple[OwnSite, OwnSite]]:
    """Two servers on one SQLite file."""
    backend = Backend("sqlite", None, tmp_path / "roomkeys.db")
    auth = StubAuth()
    sites = OwnSite(backend, auth), OwnSite(backend, auth)
    for site in sites:
        blockon(site.start())
    yield sites
    for site in sites:
        blockon(site.stop())


@inlineCallbacks
def test_others_are_answered(sites: tuple[OwnSite, OwnSite]) -> Steps:
    """While a version is deleted, other users of this process and of another one write
    again and again, none of them held up for long."""
    path = sites[0].backend.path
    owner = Client(sites[0].host, sites[0].host.new_user())
    version: str = yield owner.create_version()
    with closing(sqlite3.connect(path)) as connection, connection:
        parameters = (KEYS, owner.user.user_id, int(version))
        connection.execute(ADD_KEYS, parameters)
    others = [Client(site.host, site.host.new_user()) for site in sites]
    versions = []
    for other in others:
        versions.append((yield other.create_version()))
    deletion = owner.delete(version_path(version))
    uploads = 0
    while not deletion.called:
        for other, its_version in zip(others, versions, strict=True):
            began = time.monotonic()
            yield other.upload(its_version, {"!room": {f"{uploads}": key()}})
            assert time.monotonic() - began < 5, "the upload had to be tried again"
        uploads += 1
    accepted((yield deletion))
    assert uploads >= KEYS // DELETED_AT_ONCE // 2
    with closing(sqlite3.connect(path)) as connection:
        statement = "SELECT COUNT(*) FROM e2e_room_keys WHERE user_id = ?"
        rows = connection.execute(statement, (owner.user.user_id,)).fetchall()
    assert rows == [(0,)]
