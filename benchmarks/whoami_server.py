"""Minimal homeserver that only answers whoami: the bearer token is the user id.

The script argument is the port.
"""

import json
import sys
from typing import Any

from twisted.internet import reactor
from twisted.web.resource import Resource
from twisted.web.server import Request, Site


class Whoami(Resource):
    """Resource that answers every path with the sender's user id."""

    isLeaf = True

    def render_GET(self, request: Request) -> bytes:
        """Return the token as the user id."""
        token = (request.getHeader("Authorization") or "").removeprefix("Bearer ")
        request.setHeader("Content-Type", "application/json")
        return json.dumps({"user_id": token, "device_id": "DEVICE"}).encode()


def main() -> None:
    """Serve until killed."""
    own: Any = reactor
    whoami = Whoami()  # type: ignore[no-untyped-call]
    own.listenTCP(int(sys.argv[1]), Site(whoami), interface="127.0.0.1")
    own.run()


if __name__ == "__main__":
    main()
