"""A homeserver that knows who has a token, and little else."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import count
from typing import Any

from ..contract import User
from .processes import HOST, Server


class Homeserver(Server):
    """Answers whoami, and all else as a path that it does not know.

    It runs in a thread, so that whoever asks it may block.

    Attributes:
        paths: those of all requests but whoami, for tests to look at.
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
                """Print nothing."""

        self._server = ThreadingHTTPServer((HOST, 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever)

    @property
    def port(self) -> int:
        """The TCP port it listens on."""
        return self._server.server_port

    @property
    def url(self) -> str:
        """Locate it."""
        return f"http://{HOST}:{self.port}"

    def new_user(self, guest: bool = False) -> User:
        """Somebody whom nobody knew before."""
        number = next(self._numbers)
        user = User(f"@user{number}:test.example", f"token_{number:020}")
        self._users[user.access_token] = {
            "user_id": user.user_id,
            "device_id": "DEVICE",
            "is_guest": guest,
        }
        return user

    def new_guest(self) -> User:
        """A fresh guest."""
        return self.new_user(guest=True)

    def start(self) -> None:
        """Start answering."""
        self._thread.start()

    def stop(self) -> None:
        """Stop answering."""
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def _answer(self, path: str, token: str) -> tuple[int, dict[str, Any]]:
        if path.partition("?")[0] == "/_matrix/client/v3/account/whoami":
            if token in self._users:
                return 200, self._users[token]
            return 401, {"errcode": "M_UNKNOWN_TOKEN", "error": "Unknown token"}
        if path == "/_matrix/client/versions":
            return 200, {"versions": ["v1.11"]}
        self.paths.append(path)
        return 404, {"errcode": "M_UNRECOGNIZED", "error": "Unrecognized request"}
