"""A fake homeserver with the endpoints ``whoami`` and ``versions`` only."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import count
from typing import Any

from ..contract import User
from .processes import HOST, Server


class Homeserver(Server):
    """A fake homeserver that answers ``whoami`` and ``versions``, and 404 otherwise.

    The server runs in a thread of its own. Therefore a test may block during a request.

    Attributes:
        paths: the paths of all requests that were answered 404, in order of arrival.
    """

    def __init__(self) -> None:
        self.paths: list[str] = []
        self._users: dict[str, dict[str, Any]] = {}
        self._numbers = count()
        homeserver = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def answer(self) -> None:
                self.rfile.read(int(self.headers.get("Content-Length", 0)))
                token = self.headers.get("Authorization", "").removeprefix("Bearer ")
                status, body = homeserver._answer(self.path, token)
                content = json.dumps(body).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            do_GET = do_PUT = do_POST = do_DELETE = answer

            def log_message(self, format: str, *args: Any) -> None:
                """Discard the log line of a request."""

        self._server = ThreadingHTTPServer((HOST, 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever)

    @property
    def port(self) -> int:
        """The TCP port on which the homeserver listens."""
        return self._server.server_port

    @property
    def url(self) -> str:
        """The base URL of the homeserver."""
        return f"http://{HOST}:{self.port}"

    def new_user(self, guest: bool = False) -> User:
        """Create a user with a new id and a new token."""
        number = next(self._numbers)
        user = User(f"@user{number}:test.example", f"token_{number:020}")
        self._users[user.access_token] = {
            "user_id": user.user_id,
            "device_id": "DEVICE",
            "is_guest": guest,
        }
        return user

    def new_guest(self) -> User:
        """Create a guest with a new id and a new token."""
        return self.new_user(guest=True)

    def start(self) -> None:
        """Start the thread that answers requests."""
        self._thread.start()

    def stop(self) -> None:
        """Stop the thread and close the listening socket."""
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def _answer(self, path: str, token: str) -> tuple[int, dict[str, Any]]:
        """Return the status and the JSON body for a request."""
        if path.partition("?")[0] == "/_matrix/client/v3/account/whoami":
            if token in self._users:
                return 200, self._users[token]
            return 401, {"errcode": "M_UNKNOWN_TOKEN", "error": "Unknown token"}
        if path == "/_matrix/client/versions":
            return 200, {"versions": ["v1.11"]}
        self.paths.append(path)
        return 404, {"errcode": "M_UNRECOGNIZED", "error": "Unrecognized request"}
