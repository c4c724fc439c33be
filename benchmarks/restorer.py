"""Downloads a backup over and over, run as a script with a port and a request."""

import sys
from pathlib import Path

from .client import Connection


def main(port: int, request: bytes) -> None:
    """Download until killed; tell when it begins."""
    with Connection(port) as connection:
        print("downloading", flush=True)
        while True:
            connection.send(request)


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]).read_bytes())
