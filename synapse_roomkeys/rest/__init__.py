"""The endpoints over HTTP, for any server that servlets can be registered with."""

from .resource import HttpServer, JsonResource, RestServlet
from .room_keys import (
    Auth,
    HomeServer,
    RoomKeysNewVersionServlet,
    RoomKeysServlet,
    RoomKeysVersionServlet,
    register_servlets,
)

__all__ = [
    "Auth",
    "HomeServer",
    "HttpServer",
    "JsonResource",
    "RestServlet",
    "RoomKeysNewVersionServlet",
    "RoomKeysServlet",
    "RoomKeysVersionServlet",
    "register_servlets",
]
