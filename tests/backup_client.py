"""The key backup of a Matrix client: real Megolm sessions over blocking HTTP."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

import attrs
from canonicaljson import encode_canonical_json
from vodozemac import (
    Account,
    Curve25519PublicKey,
    Curve25519SecretKey,
    Ed25519Signature,
    ExportedSessionKey,
    GroupSession,
    InboundGroupSession,
    MegolmMessage,
    Message,
    PkDecryption,
    PkEncryption,
)

from . import blocking_http
from .contract.base import (
    ALGORITHM,
    AUTH_DATA,
    PREFIX,
    Answer,
    Rooms,
    accepted,
    encoded,
    key,
    keys_path,
    same,
    tally,
    version_path,
    wrapped,
)

MEGOLM = "m.megolm.v1.aes-sha2"
#: Element uploads 100 keys in one request.
BATCH = 100


@attrs.frozen
class Api:
    """The `/room_keys` endpoints for one device. Paths begin after the prefix."""

    url: str
    token: str = attrs.field(repr=False)
    prefix: str = PREFIX

    def request(self, method: str, path: str, body: Any = None) -> Answer:
        """Send a request and return the answer.

        Raises:
            AssertionError: The answer is a 5xx, or holds a traceback or the token.
        """
        headers = {"Authorization": f"Bearer {self.token}"}
        url = self.url + self.prefix + path
        answer = blocking_http.send(method, url, headers, encoded(body))
        where = f"{method} {path[:200]}: {answer}"
        assert answer.status < 500, where
        assert b"Traceback" not in answer.body, where
        assert self.token.encode() not in answer.body, where
        return answer

    def get(self, path: str) -> Answer:
        """Send a GET request and return the answer."""
        return self.request("GET", path)

    def put(self, path: str, body: Any) -> Answer:
        """Send a PUT request with a JSON body and return the answer."""
        return self.request("PUT", path, body)

    def post(self, path: str, body: Any) -> Answer:
        """Send a POST request with a JSON body and return the answer."""
        return self.request("POST", path, body)

    def delete(self, path: str) -> Answer:
        """Send a DELETE request and return the answer."""
        return self.request("DELETE", path)

    def create_version(self, auth_data: Any = AUTH_DATA) -> str:
        """Create a backup version and return its number."""
        body = {"algorithm": ALGORITHM, "auth_data": auth_data}
        version: str = accepted(self.post("/version", body))["version"]
        return version

    def info(self, version: str | None = None) -> dict[str, Any]:
        """Read a version, or the current version by default, and return the body."""
        path = "/version" if version is None else version_path(version)
        body: dict[str, Any] = accepted(self.get(path), path)
        return body

    def tally(self, version: str) -> tuple[int, int]:
        """Read the etag, as a number, and the count of a version."""
        info = self.info(version)
        return int(info["etag"]), info["count"]

    def upload(self, version: str, rooms: Rooms) -> tuple[int, int]:
        """Upload keys in one request; return the etag, as a number, and the count."""
        return tally(self.put(keys_path(version), wrapped(rooms)), "PUT /keys")

    def download(self, version: str) -> Rooms:
        """Return all keys of a version.

        Raises:
            AssertionError: The answer has members other than the keys.
        """
        body = accepted(self.get(keys_path(version)), "GET /keys")
        rooms: Rooms = {name: room["sessions"] for name, room in body["rooms"].items()}
        same(body, wrapped(rooms), "GET /keys")
        return rooms


def reset(api: Api) -> list[str]:
    """Delete the current version until there is none; return the deleted versions.

    Raises:
        AssertionError: A deleted version became current again, or the last 404 is no
            M_NOT_FOUND in JSON.
    """
    deleted: list[str] = []
    while (answer := api.get("/version")).status != 404:
        version: str = accepted(answer)["version"]
        assert version not in deleted, f"{version} is current again"
        accepted(api.delete(version_path(version)))
        deleted.append(version)
    assert answer.json["errcode"] == "M_NOT_FOUND", answer
    assert answer.headers["content-type"] == "application/json", answer
    return deleted


@attrs.frozen
class Session:
    """A Megolm session as a reader of the room holds it."""

    room_id: str
    sender_key: str
    claimed_key: str
    inbound: InboundGroupSession

    @property
    def session_id(self) -> str:
        """Id of the session."""
        return self.inbound.session_id

    @property
    def first_index(self) -> int:
        """The index of the first message that this session decrypts."""
        return self.inbound.first_known_index

    def at(self, index: int) -> Session:
        """The session as held by a reader who joined at a later message."""
        return attrs.evolve(self, inbound=import_session(self.export(index)))

    def export(self, index: int | None = None) -> str:
        """Export the session's key at a message index, by default the first known
        index."""
        exported = self.inbound.export_at(self.first_index if index is None else index)
        assert exported is not None
        return exported.to_base64()

    def decrypt(self, content: Mapping[str, Any]) -> str:
        """Decrypt an `m.room.encrypted` event and return its text.

        Raises:
            AssertionError: The event is of another room.
        """
        message = MegolmMessage.from_base64(content["ciphertext"])
        event = json.loads(self.inbound.decrypt(message).plaintext)
        assert event["room_id"] == self.room_id
        text: str = event["content"]["body"]
        return text


@attrs.frozen
class Sender:
    """A Megolm session as held by the device that encrypts with the session."""

    account: Account
    room_id: str
    outbound: GroupSession = attrs.field(factory=GroupSession)

    def session(self) -> Session:
        """The session as shared now. It decrypts only messages encrypted later."""
        return Session(
            self.room_id,
            self.account.curve25519_key.to_base64(),
            self.account.ed25519_key.to_base64(),
            InboundGroupSession(self.outbound.session_key),
        )

    def encrypt(self, text: str) -> dict[str, Any]:
        """Encrypt a text and return the content of an `m.room.encrypted` event."""
        event = {
            "room_id": self.room_id,
            "type": "m.room.message",
            "content": {"msgtype": "m.text", "body": text},
        }
        message = self.outbound.encrypt(json.dumps(event).encode())
        return {
            "algorithm": MEGOLM,
            "ciphertext": message.to_base64(),
            "session_id": self.outbound.session_id,
        }


def import_session(session_key: str) -> InboundGroupSession:
    """Return a session from its exported key."""
    return InboundGroupSession.import_session(ExportedSessionKey(session_key))


def signed_auth_data(
    public_key: str, account: Account, user_id: str, device_id: str
) -> dict[str, Any]:
    """Return `auth_data` for a new version: the public key, signed by the device."""
    unsigned = {"public_key": public_key}
    signature = account.sign(encode_canonical_json(unsigned)).to_base64()
    return {**unsigned, "signatures": {user_id: {f"ed25519:{device_id}": signature}}}


def check_signature(
    auth_data: Mapping[str, Any], account: Account, user_id: str, device_id: str
) -> None:
    """Check the signature of a version's public key.

    Raises:
        SignatureException: The device did not sign this public key.
    """
    unsigned = {name: auth_data[name] for name in auth_data if name != "signatures"}
    signature = auth_data["signatures"][user_id][f"ed25519:{device_id}"]
    account.ed25519_key.verify_signature(
        encode_canonical_json(unsigned), Ed25519Signature.from_base64(signature)
    )


def encrypt_session(
    session: Session, public_key: str, **metadata: Any
) -> dict[str, Any]:
    """Encrypt a session for the holder of the private key; return the key to upload."""
    plaintext = {
        "algorithm": MEGOLM,
        "forwarding_curve25519_key_chain": [],
        "sender_claimed_keys": {"ed25519": session.claimed_key},
        "sender_key": session.sender_key,
        "session_key": session.export(),
    }
    encryption = PkEncryption.from_key(Curve25519PublicKey.from_base64(public_key))
    message = encryption.encrypt(json.dumps(plaintext).encode())
    ephemeral, mac, ciphertext = message.to_base64()
    data = {"ephemeral": ephemeral, "mac": mac, "ciphertext": ciphertext}
    return key(session.first_index, data=data, **metadata)


def decrypt_session(
    room_id: str, session_id: str, backed_up: Mapping[str, Any], private_key: str
) -> Session:
    """Decrypt a backed-up key and return its session.

    Raises:
        AssertionError: The session has another algorithm, id or first index than the
            backup says.
    """
    data = backed_up["session_data"]
    message = Message.from_base64(data["ciphertext"], data["mac"], data["ephemeral"])
    secret = Curve25519SecretKey.from_base64(private_key)
    plaintext = json.loads(PkDecryption.from_key(secret).decrypt(message))
    assert plaintext["algorithm"] == MEGOLM
    inbound = import_session(plaintext["session_key"])
    assert inbound.session_id == session_id
    assert inbound.first_known_index == backed_up["first_message_index"]
    claimed_key = plaintext["sender_claimed_keys"]["ed25519"]
    return Session(room_id, plaintext["sender_key"], claimed_key, inbound)


def back_up(
    api: Api, version: str, sessions: Iterable[Session], **metadata: Any
) -> tuple[int, int]:
    """Upload sessions in batches as Element does, encrypted for the version's public
    key.

    Returns:
        The etag, as a number, and the count after the last batch.
    """
    public_key = api.info(version)["auth_data"]["public_key"]
    left = list(sessions)
    state = api.tally(version)
    while left:
        batch, left = left[:BATCH], left[BATCH:]
        rooms: Rooms = {}
        for session in batch:
            room = rooms.setdefault(session.room_id, {})
            room[session.session_id] = encrypt_session(session, public_key, **metadata)
        state = api.upload(version, rooms)
    return state


def restored(rooms: Rooms, private_key: str) -> dict[str, Session]:
    """Decrypt all keys of a download and return the sessions by session id."""
    return {
        session_id: decrypt_session(room_id, session_id, backed_up, private_key)
        for room_id, room in rooms.items()
        for session_id, backed_up in room.items()
    }
