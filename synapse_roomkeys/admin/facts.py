"""Users, versions and changes as JSON objects, for the commands and for HTTP."""

import json
from typing import Any

import attrs

from ..storage import Owner, VersionFacts
from ..types import RecordedChange

#: Sessions of a change: by room, the ids of the ``stored`` and ``replaced`` ones.
Sessions = dict[str, dict[str, list[str]]]


def describe_owner(owner: Owner) -> dict[str, Any]:
    """Describe a user in a list."""
    return {
        "user": owner.user_id,
        "keys": owner.keys,
        "bytes": owner.size,
        "versions": len(owner.versions),
        "last_upload_ms": owner.uploaded_ms,
    }


def describe_version(version: VersionFacts) -> dict[str, Any]:
    """Describe a version, with the public parts of ``auth_data`` only."""
    auth_data = _parse_object(version.auth_data)
    signatures = auth_data.get("signatures")
    own = signatures.get(version.user_id) if isinstance(signatures, dict) else None
    return {
        "user": version.user_id,
        "version": str(version.version),
        "state": version.state,
        "algorithm": version.algorithm,
        "public_key": auth_data.get("public_key"),
        "signed_by": sorted(own) if isinstance(own, dict) else [],
        "keys": version.keys,
        "bytes": version.size,
        "etag": str(version.etag),
        "created_ms": version.created_ms,
        "last_upload_ms": version.uploaded_ms,
        "last_upload_device": version.device_id,
        "deleted_ms": version.deleted_ms,
    }


def describe_change(change: RecordedChange) -> dict[str, Any]:
    """Describe a recorded change, with the ids of its sessions."""
    return {
        **attrs.asdict(change),
        "version": str(change.version),
        "etag": str(change.etag),
        "sessions": sessions_of(change),
    }


def sessions_of(change: RecordedChange) -> Sessions:
    """Return the sessions that a change names."""
    sessions: Sessions = json.loads(change.sessions or "{}")
    return sessions


def _parse_object(text: str | None) -> dict[str, Any]:
    """Return the object of a JSON text; an empty object for any other text."""
    try:
        value = json.loads(text or "{}")
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}
