"""Script that downloads a backup in a loop: arguments are a port and a request file."""

import sys
from pathlib import Path

from .client import Connection


def main(port: int, request: bytes) -> None:
    """Print a line at the start, then send the request in a loop until killed."""
    with Connection(port) as connection:
        print("downloading", flush=True)
        while True:
            connection.send(request)


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]).read_bytes())
