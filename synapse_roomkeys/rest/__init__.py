"""The HTTP endpoints, for any server with Synapse's interface for servlets."""

from .admin import register_admin_servlets
from .host import AdminAuth, AdminHost, Auth, HomeServer
from .resource import HttpServer, JsonResource, RestServlet
from .room_keys import (
    RoomKeysNewVersionServlet,
    RoomKeysServlet,
    RoomKeysVersionServlet,
    register_servlets,
)

__all__ = [
    "AdminAuth",
    "AdminHost",
    "Auth",
    "HomeServer",
    "HttpServer",
    "JsonResource",
    "RestServlet",
    "RoomKeysNewVersionServlet",
    "RoomKeysServlet",
    "RoomKeysVersionServlet",
    "register_admin_servlets",
    "register_servlets",
]
