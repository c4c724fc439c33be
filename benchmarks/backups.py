"""Backups on the servers, and the requests that concern them."""

import json
from collections.abc import Mapping, Sequence
from urllib.parse import quote

import attrs

from tests.servers import Synapse

from .client import Answer, Connection, build
from .databases import Database
from .keys import Key, body

API = "/_matrix/client/v3"


@attrs.frozen
class Account:
    """A user of one of the servers."""

    user_id: str
    token: str


@attrs.frozen
class Subject:
    """One of the servers that are compared."""

    name: str
    port: int
    pid: int
    database: Database
    connection: Connection
    synapse: Synapse | None = None

    def register(self, name: str) -> Account:
        """Make a user; where there is no Synapse, the token is the user's id."""
        if self.synapse is None:
            user_id = f"@{name}:test.example"
            return Account(user_id, user_id)
        user = self.synapse.register(name)
        return Account(user.user_id, user.access_token)


@attrs.frozen
class Backup:
    """One user's backup on one server, and the requests that concern it."""

    subject: Subject
    account: Account
    version: int

    def upload(self, keys: Sequence[Key], work: str = "insert") -> bytes:
        """Write the upload of many keys."""
        return self._keys("PUT", "", body(keys), work)

    def upload_one(self, key: Key) -> bytes:
        """Write the upload of a single key."""
        content = key.json().encode()
        return self._keys("PUT", _session(key), content, "insert-one")

    def get_key(self, key: Key) -> bytes:
        """Write the download of one key."""
        return self._keys("GET", _session(key), b"", "key")

    def get_room(self, room_id: str) -> bytes:
        """Write the download of a room."""
        return self._keys("GET", f"/{quote(room_id, safe='')}", b"", "room")

    def get_whole(self) -> bytes:
        """Write the download of everything."""
        return self._keys("GET", "", b"", "whole")

    def get_version(self) -> bytes:
        """Write the look at the current version."""
        return build(
            "GET",
            f"{API}/room_keys/version",
            self.account.token,
            work="version",
        )

    def delete(self) -> bytes:
        """Write the deletion of the whole backup."""
        target = f"{API}/room_keys/version/{self.version}"
        return build("DELETE", target, self.account.token, work="delete")

    def whoami(self) -> bytes:
        """Write a cheap request that has nothing to do with backups."""
        return build("GET", f"{API}/account/whoami", self.account.token)

    def send(self, request: bytes) -> Answer:
        """Send a request over the subject's connection."""
        return self.subject.connection.send(request)

    def fetch(self, request: bytes) -> object:
        """Send a request and decode the answer."""
        return json.loads(self.subject.connection.fetch(request))

    def milliseconds(self, request: bytes) -> float:
        """Send a request and return what it took."""
        return self.send(request).seconds * 1e3

    def _keys(self, method: str, path: str, content: bytes, work: str) -> bytes:
        """Write a request about keys."""
        target = f"{API}/room_keys/keys{path}?version={self.version}"
        return build(method, target, self.account.token, content, work)


Backups = Mapping[str, Backup]


def _session(key: Key) -> str:
    """Locate a key under a backup."""
    return f"/{quote(key.room_id, safe='')}/{quote(key.session_id, safe='')}"
