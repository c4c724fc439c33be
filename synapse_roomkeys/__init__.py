"""Server-side key backup for Matrix: the ``/room_keys`` endpoints.

``RoomKeysModule`` is the module for homeserver.yaml. It is imported only when the name
is used, because this package can also be imported without an installed Synapse.
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
