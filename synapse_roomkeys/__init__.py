"""Server-side key backup for Matrix: the ``/room_keys`` endpoints.

``RoomKeysModule`` is what homeserver.yaml names. It is looked up when it is asked for,
so that this package can be imported where Synapse isn't installed.
"""

from typing import Any

from .handler import E2eRoomKeysHandler
from .rest import (
    RoomKeysNewVersionServlet,
    RoomKeysServlet,
    RoomKeysVersionServlet,
    register_servlets,
)
from .version import __version__

__all__ = [
    "E2eRoomKeysHandler",
    "RoomKeysModule",
    "RoomKeysNewVersionServlet",
    "RoomKeysServlet",
    "RoomKeysVersionServlet",
    "__version__",
    "register_servlets",
]


def __getattr__(name: str) -> Any:
    if name == "RoomKeysModule":
        from .synapse_module import RoomKeysModule

        return RoomKeysModule
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
