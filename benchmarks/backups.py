"""Backups on the measured servers, and the HTTP requests to them."""

import json
from collections.abc import Mapping, Sequence
from urllib.parse import quote

import attrs

from tests.servers import Synapse

from .client import Connection, Response, build_request
from .databases import Database
from .keys import Key, upload_body

API = "/_matrix/client/v3"


@attrs.frozen
class Account:
    """A user of a measured server, with an access token."""

    user_id: str
    token: str


@attrs.frozen
class MeasuredServer:
    """A running server that the benchmark compares with others.

    Synapse is None for the service and for the limit.
    """

    name: str
    port: int
    pid: int
    database: Database
    connection: Connection
    synapse: Synapse | None = None

    def register(self, name: str) -> Account:
        """Register a user; without a Synapse, use the user id as the token."""
        if self.synapse is None:
            user_id = f"@{name}:test.example"
            return Account(user_id, user_id)
        user = self.synapse.register(name)
        return Account(user.user_id, user.access_token)


@attrs.frozen
class Backup:
    """A user's backup on a server, with builders of its HTTP requests."""

    server: MeasuredServer
    account: Account
    version: int

    def upload(self, keys: Sequence[Key], statement: str = "insert") -> bytes:
        """Build the upload of many keys; the limit runs the named statement."""
        return self._keys("PUT", "", upload_body(keys), statement)

    def upload_one(self, key: Key) -> bytes:
        """Build the upload of a single key."""
        content = key.to_json().encode()
        return self._keys("PUT", _session(key), content, "insert-one")

    def get_key(self, key: Key) -> bytes:
        """Build the download of a key."""
        return self._keys("GET", _session(key), b"", "key")

    def get_room(self, room_id: str) -> bytes:
        """Build the download of a room."""
        return self._keys("GET", f"/{quote(room_id, safe='')}", b"", "room")

    def get_whole(self) -> bytes:
        """Build the download of the whole backup."""
        return self._keys("GET", "", b"", "whole")

    def get_version(self) -> bytes:
        """Build the request for the current version."""
        return build_request(
            "GET",
            f"{API}/room_keys/version",
            self.account.token,
            statement="version",
        )

    def delete(self) -> bytes:
        """Build the deletion of the whole backup."""
        target = f"{API}/room_keys/version/{self.version}"
        return build_request("DELETE", target, self.account.token, statement="delete")

    def whoami(self) -> bytes:
        """Build a cheap request that doesn't touch the backup."""
        return build_request("GET", f"{API}/account/whoami", self.account.token)

    def send(self, request: bytes) -> Response:
        """Send a request over the server's kept-alive connection."""
        return self.server.connection.send(request)

    def fetch(self, request: bytes) -> object:
        """Send a request and return the decoded JSON of the response."""
        return json.loads(self.server.connection.fetch(request))

    def milliseconds(self, request: bytes) -> float:
        """Send a request and return its duration in milliseconds."""
        return self.send(request).seconds * 1e3

    def _keys(self, method: str, path: str, content: bytes, statement: str) -> bytes:
        """Build a request to ``/room_keys/keys`` or to a path below it."""
        target = f"{API}/room_keys/keys{path}?version={self.version}"
        return build_request(method, target, self.account.token, content, statement)


Backups = Mapping[str, Backup]


def _session(key: Key) -> str:
    """Return the path of a key below ``/room_keys/keys``."""
    return f"/{quote(key.room_id, safe='')}/{quote(key.session_id, safe='')}"
