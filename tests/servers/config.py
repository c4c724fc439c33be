"""Builders for the configuration of every Synapse that the tests start."""

import base64
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .processes import HOST

SERVER_NAME = "test.example"
REGISTRATION_SECRET = secrets.token_hex(16)
SIGNING_KEY = "ed25519 a_test " + base64.b64encode(os.urandom(32)).decode().rstrip("=")

_MACAROON_SECRET = secrets.token_hex(16)
_FORM_SECRET = secrets.token_hex(16)
_REPLICATION_SECRET = secrets.token_hex(16)

_UNLIMITED = {"per_second": 100_000, "burst_count": 100_000}
_LIMITS = (
    "rc_admin_redaction",
    "rc_joins_per_room",
    "rc_media_create",
    "rc_message",
    "rc_registration",
    "rc_registration_token_validity",
    "rc_reports",
    "rc_room_creation",
    "rc_3pid_validation",
    "rc_third_party_invite",
    "rc_user_directory",
)
_NESTED_LIMITS = {
    "rc_invites": ("per_room", "per_user", "per_issuer"),
    "rc_joins": ("local", "remote"),
    "rc_login": ("address", "account", "failed_attempts"),
    "rc_presence": ("per_user",),
}


def base() -> dict[str, Any]:
    """Build the settings that are the same on every port and in every directory."""
    return {
        "server_name": SERVER_NAME,
        "registration_shared_secret": REGISTRATION_SECRET,
        "macaroon_secret_key": _MACAROON_SECRET,
        "form_secret": _FORM_SECRET,
        "enable_registration": True,
        "enable_registration_without_verification": True,
        "allow_guest_access": True,
        "refreshable_access_token_lifetime": "1s",
        "bcrypt_rounds": 4,
        "enable_metrics": True,
        "report_stats": False,
        "trusted_key_servers": [],
        "suppress_key_server_warning": True,
        "federation_domain_whitelist": [],
        **_rate_limits(),
    }


def database(arguments: Mapping[str, Any] | None, directory: Path) -> dict[str, Any]:
    """Build the ``database`` setting.

    Args:
        arguments: psycopg2's arguments for a PostgreSQL, or None for an SQLite file.
        directory: the directory of the SQLite file.
    """
    if arguments is None:
        path = str(directory / "homeserver.db")
        return {"name": "sqlite3", "args": {"database": path}}
    return {"name": "psycopg2", "args": {"cp_min": 1, "cp_max": 10, **arguments}}


def module(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Build the ``modules`` entry for the module under test with the given options."""
    return {"module": "synapse_roomkeys.RoomKeysModule", "config": dict(settings)}


def replication(redis_port: int, replication_port: int) -> dict[str, Any]:
    """Build the settings for connections between workers and their main process."""
    return {
        "redis": {"enabled": True, "host": HOST, "port": redis_port},
        "instance_map": {"main": {"host": HOST, "port": replication_port}},
        "worker_replication_secret": _REPLICATION_SECRET,
    }


def listeners(port: int, metrics_port: int) -> list[dict[str, Any]]:
    """Build listeners for clients on one port and for metrics on another.

    Synapse takes the client's address from X-Forwarded-For on the first port, as behind
    a proxy.
    """
    metrics = {"type": "metrics", "port": metrics_port, "bind_addresses": [HOST]}
    return [{**http(port, "client"), "x_forwarded": True}, metrics]


def http(port: int, resource: str) -> dict[str, Any]:
    """Build a listener for one of Synapse's HTTP resources, such as ``client``."""
    return {
        "type": "http",
        "port": port,
        "bind_addresses": [HOST],
        "resources": [{"names": [resource]}],
    }


def log(file: Path) -> dict[str, Any]:
    """Build a logging configuration that writes INFO to a file, without SQL
    statements."""
    line = "%(asctime)s %(levelname)s %(name)s %(request)s %(message)s"
    handler = {
        "class": "logging.FileHandler",
        "filename": str(file),
        "encoding": "utf-8",
        "formatter": "line",
    }
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {"line": {"format": line}},
        "handlers": {"file": handler},
        "loggers": {"synapse.storage.SQL": {"level": "WARNING"}},
        "root": {"level": "INFO", "handlers": ["file"]},
    }


def _rate_limits() -> dict[str, Any]:
    """Build settings that raise every request rate limit beyond the tests' reach."""
    limits: dict[str, Any] = dict.fromkeys(_LIMITS, _UNLIMITED)
    for name, parts in _NESTED_LIMITS.items():
        limits[name] = dict.fromkeys(parts, _UNLIMITED)
    return limits
