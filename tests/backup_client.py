"""A Matrix client's part in the key backup: real Megolm, over HTTP that blocks."""

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
#: What Element uploads in one request, in keys.
BATCH = 100


@attrs.frozen
class Api:
    """One device's `/room_keys`; paths start below the prefix."""

    url: str
    token: str = attrs.field(repr=False)

    def request(self, method: str, path: str, body: Any = None) -> Answer:
        """Any request; no answer may be a crash, a traceback or hold the token."""
        headers = {"Authorization": f"Bearer {self.token}"}
        url = self.url + PREFIX + path
        answer = blocking_http.send(method, url, headers, encoded(body))
        where = f"{method} {path[:200]}: {answer}"
        assert answer.status < 500, where
        assert b"Traceback" not in answer.body, where
        assert self.token.encode() not in answer.body, where
        return answer

    def get(self, path: str) -> Answer:
        return self.request("GET", path)

    def put(self, path: str, body: Any) -> Answer:
        return self.request("PUT", path, body)

    def delete(self, path: str) -> Answer:
        return self.request("DELETE", path)

    def create_version(self, auth_data: Any = AUTH_DATA) -> str:
        body = {"algorithm": ALGORITHM, "auth_data": auth_data}
        version: str = accepted(self.request("POST", "/version", body))["version"]
        return version

    def info(self, version: str | None = None) -> dict[str, Any]:
        """What the server says of a backup, the current one by default."""
        path = "/version" if version is None else version_path(version)
        body: dict[str, Any] = accepted(self.get(path), path)
        return body

    def tally(self, version: str) -> tuple[int, int]:
        """The etag, as a number, and the count that a backup has now."""
        info = self.info(version)
        return int(info["etag"]), info["count"]

    def upload(self, version: str, rooms: Rooms) -> tuple[int, int]:
        """Upload keys in one request; the etag, as a number, and the count."""
        return tally(self.put(keys_path(version), wrapped(rooms)), "PUT /keys")

    def download(self, version: str) -> Rooms:
        """All keys of a backup; nothing but the keys may be in the answer."""
        body = accepted(self.get(keys_path(version)), "GET /keys")
        rooms: Rooms = {name: room["sessions"] for name, room in body["rooms"].items()}
        same(body, wrapped(rooms), "GET /keys")
        return rooms


def reset(api: Api) -> list[str]:
    """Delete the current version until there is none; the versions deleted."""
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
    """A Megolm session as somebody holds it who reads along."""

    room_id: str
    sender_key: str
    claimed_key: str
    inbound: InboundGroupSession

    @property
    def session_id(self) -> str:
        return self.inbound.session_id

    @property
    def first_index(self) -> int:
        """The first message that it decrypts."""
        return self.inbound.first_known_index

    def at(self, index: int) -> Session:
        """The session as somebody holds it who was let in at a later message."""
        return attrs.evolve(self, inbound=import_session(self.export(index)))

    def export(self, index: int | None = None) -> str:
        """The session's key at a message, the first known one by default."""
        exported = self.inbound.export_at(self.first_index if index is None else index)
        assert exported is not None
        return exported.to_base64()

    def decrypt(self, content: Mapping[str, Any]) -> str:
        """The text of an `m.room.encrypted` event of this session and room."""
        message = MegolmMessage.from_base64(content["ciphertext"])
        event = json.loads(self.inbound.decrypt(message).plaintext)
        assert event["room_id"] == self.room_id
        text: str = event["content"]["body"]
        return text


@attrs.frozen
class Sender:
    """A Megolm session as the device holds it that writes with it."""

    account: Account
    room_id: str
    outbound: GroupSession = attrs.field(factory=GroupSession)

    def session(self) -> Session:
        """The session as it is handed out now: it reads what is written from now on."""
        return Session(
            self.room_id,
            self.account.curve25519_key.to_base64(),
            self.account.ed25519_key.to_base64(),
            InboundGroupSession(self.outbound.session_key),
        )

    def encrypt(self, text: str) -> dict[str, Any]:
        """The content of an `m.room.encrypted` event."""
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
    """A session from its exported key."""
    return InboundGroupSession.import_session(ExportedSessionKey(session_key))


def signed_auth_data(
    public_key: str, account: Account, user_id: str, device_id: str
) -> dict[str, Any]:
    """What a device writes into a new version: the public key, and its signature."""
    unsigned = {"public_key": public_key}
    signature = account.sign(encode_canonical_json(unsigned)).to_base64()
    return {**unsigned, "signatures": {user_id: {f"ed25519:{device_id}": signature}}}


def check_signature(
    auth_data: Mapping[str, Any], account: Account, user_id: str, device_id: str
) -> None:
    """Trust a version's public key, or raise a `SignatureException`."""
    unsigned = {name: auth_data[name] for name in auth_data if name != "signatures"}
    signature = auth_data["signatures"][user_id][f"ed25519:{device_id}"]
    account.ed25519_key.verify_signature(
        encode_canonical_json(unsigned), Ed25519Signature.from_base64(signature)
    )


def sealed(session: Session, public_key: str, **metadata: Any) -> dict[str, Any]:
    """A session as it is backed up, for the holder of the private key to read."""
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


def unsealed(
    room_id: str, session_id: str, backed_up: Mapping[str, Any], private_key: str
) -> Session:
    """A session from its backup; it must be the one that was asked for."""
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
    """Upload sessions as Element does, in batches, with the version's public key."""
    public_key = api.info(version)["auth_data"]["public_key"]
    left = list(sessions)
    state = api.tally(version)
    while left:
        batch, left = left[:BATCH], left[BATCH:]
        rooms: Rooms = {}
        for session in batch:
            room = rooms.setdefault(session.room_id, {})
            room[session.session_id] = sealed(session, public_key, **metadata)
        state = api.upload(version, rooms)
    return state


def restored(rooms: Rooms, private_key: str) -> dict[str, Session]:
    """The sessions of a download, by their ids."""
    return {
        session_id: unsealed(room_id, session_id, backed_up, private_key)
        for room_id, room in rooms.items()
        for session_id, backed_up in room.items()
    }
