"""Decryption of messages with keys from the backup only, with real Megolm.

The backup is served by the module in a Synapse, or by the service beside the Synapse.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from itertools import chain, count
from typing import Any

import attrs
import pytest
from vodozemac import (
    Account,
    Curve25519SecretKey,
    GroupSession,
    MegolmDecryptionException,
    PkDecodeException,
)

from ..backup_client import (
    BATCH,
    Api,
    Sender,
    Session,
    back_up,
    check_signature,
    reset,
    restored,
    signed_auth_data,
)
from ..contract.base import (
    NO_KEY,
    NO_VERSION,
    accepted,
    keys_path,
    quoted,
    refused,
    same,
    version_path,
)
from ..servers import Synapse, User
from ..servers.accounts import fetch
from ..servers.service import Service

CLIENT = "/_matrix/client/v3"
#: Room versions under test; room ids of version 12 have no server name.
ROOM_VERSIONS = {"10", "11", "12"}

_numbers = count()


def private_key() -> str:
    """Return a new private backup key, in base64."""
    return Curve25519SecretKey().to_base64()


def public_key_of(private: str) -> str:
    """Return the public key of a private key, both in base64."""
    return Curve25519SecretKey.from_base64(private).public_key().to_base64()


def outbound_with_special_id() -> GroupSession:
    """Return a new Megolm session with / and + in its id; paths must quote both."""
    while not {"/", "+"} <= set((session := GroupSession()).session_id):
        pass
    return session


@attrs.frozen
class Device:
    """A device on which a user is logged in.

    Attributes:
        synapse: the homeserver.
        user: the user with the device's access token.
        backups: the base URL for ``/room_keys``.
        account: the device's Olm account.
    """

    synapse: Synapse
    user: User
    backups: str
    account: Account = attrs.field(factory=Account)

    @property
    def api(self) -> Api:
        """The device's client for ``/room_keys``."""
        return Api(self.backups, self.user.access_token)

    def login(self, user: User) -> Device:
        """Log a user of the same homeserver in on another device; return the device."""
        return Device(self.synapse, self.synapse.login(user), self.backups)

    def call(self, method: str, path: str, body: Any = None) -> dict[str, Any]:
        """Send a request to the rest of the client-server API; return the JSON
        object."""
        token = self.user.access_token
        url = self.synapse.url + CLIENT + path
        answer = fetch(url, method=method, token=token, body=body)
        content: dict[str, Any] = json.loads(answer)
        return content

    def room_versions(self) -> list[str]:
        """Return the room versions under test that the homeserver supports."""
        known = self.call("GET", "/capabilities")["capabilities"]["m.room_versions"]
        return sorted(ROOM_VERSIONS & known["available"].keys())

    def create_room(self, version: str = "10") -> str:
        """Create a room and return its id."""
        body = {"room_version": version}
        room_id: str = self.call("POST", "/createRoom", body)["room_id"]
        return room_id

    def write(self, sender: Sender, text: str) -> None:
        """Send an encrypted message to the sender's room."""
        path = f"/rooms/{quoted(sender.room_id)}/send/m.room.encrypted"
        self.call("PUT", f"{path}/{next(_numbers)}", sender.encrypt(text))

    def read(self, room_id: str) -> list[dict[str, Any]]:
        """Return the contents of a room's encrypted messages."""
        path = f"/rooms/{quoted(room_id)}/messages?dir=f&limit=100"
        events = self.call("GET", path)["chunk"]
        return [e["content"] for e in events if e["type"] == "m.room.encrypted"]

    def create_backup(self, private: str) -> str:
        """Create a version whose auth_data this device has signed; return the
        version."""
        user = self.user
        return self.api.create_version(
            signed_auth_data(
                public_key_of(private), self.account, user.user_id, user.device_id
            )
        )

    def sender(self, room_id: str) -> Sender:
        """Start a new Megolm session in a room."""
        return Sender(self.account, room_id, outbound_with_special_id())


@attrs.frozen
class History:
    """The data that remain of a user whose only device is lost.

    Attributes:
        user: the user, logged out.
        version: the version of the backup.
        private: the private backup key.
        plain_texts: the plain texts of the messages, by room and session.
    """

    user: User
    version: str
    private: str = attrs.field(repr=False)
    plain_texts: dict[str, dict[str, list[str]]]

    def texts(self, room_id: str) -> list[str]:
        """Return the plain texts of a room's messages, sorted."""
        return sorted(chain.from_iterable(self.plain_texts[room_id].values()))


@pytest.fixture(scope="module", params=["module", "service"])
def backups(
    request: pytest.FixtureRequest,
    synapse: Synapse,
    database: Callable[[], Mapping[str, Any] | None],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[str]:
    """The base URL for ``/room_keys``, of the module first and then of the service."""
    if request.param == "module":
        yield synapse.url
        return
    directory = tmp_path_factory.mktemp("service")
    with Service(directory, synapse.url, database=database()) as service:
        yield service.url


def new_device(synapse: Synapse, backups: str) -> Device:
    """Register a user, and return the user's first device."""
    user = synapse.register(f"megolm{next(_numbers)}")
    return Device(synapse, user, backups)


@pytest.fixture
def device(synapse: Synapse, backups: str) -> Device:
    """The first device of a new user."""
    return new_device(synapse, backups)


@pytest.fixture(scope="module")
def history(synapse: Synapse, backups: str) -> History:
    """A user who sent messages in several rooms and sessions, backed the keys up, and
    lost the device. The tests log the user in again and change nothing."""
    device = new_device(synapse, backups)
    private = private_key()
    version = device.create_backup(private)
    sessions: list[Session] = []
    plain_texts: dict[str, dict[str, list[str]]] = {}
    for room_version in device.room_versions():
        room_id = device.create_room(room_version)
        senders = [device.sender(room_id) for _ in range(3)]
        sessions += [sender.session() for sender in senders]
        plain_texts[room_id] = {
            s.outbound.session_id: send_messages(device, s) for s in senders
        }
    assert back_up(device.api, version, sessions) == (1, len(sessions))
    device.synapse.logout(device.user)
    return History(device.user, version, private, plain_texts)


def send_messages(device: Device, sender: Sender) -> list[str]:
    """Send two messages in a session; return their plain texts."""
    texts = [f"message {next(_numbers)}" for _ in range(2)]
    for text in texts:
        device.write(sender, text)
    return texts


def decrypted(
    device: Device, room_id: str, sessions: dict[str, Session]
) -> tuple[list[str], int]:
    """Return a room's decrypted messages, sorted, and the number of undecryptable
    messages."""
    contents = device.read(room_id)
    known = [content for content in contents if content["session_id"] in sessions]
    texts = [sessions[content["session_id"]].decrypt(content) for content in known]
    return sorted(texts), len(contents) - len(known)


def only_session(device: Device, version: str, private: str) -> Session:
    """Restore a backup of exactly one session; return the session."""
    (session,) = restored(device.api.download(version), private).values()
    return session


def test_the_whole_backup_restores_every_message(
    device: Device, history: History
) -> None:
    """A new device with the private key decrypts all messages of the lost device."""
    second = device.login(history.user)
    version = second.api.info()["version"]
    sessions = restored(second.api.download(version), history.private)
    for room_id in history.plain_texts:
        assert decrypted(second, room_id, sessions) == (history.texts(room_id), 0)


def test_one_room_restores_its_messages(device: Device, history: History) -> None:
    """The keys of a room decrypt the messages of the room and of no other room."""
    second = device.login(history.user)
    for room_id in history.plain_texts:
        answer = second.api.get(keys_path(history.version, room_id))
        room = accepted(answer)["sessions"]
        sessions = restored({room_id: room}, history.private)
        assert decrypted(second, room_id, sessions) == (history.texts(room_id), 0)
        unread = [
            decrypted(second, o, sessions) for o in history.plain_texts if o != room_id
        ]
        assert unread == [([], 6)] * (len(history.plain_texts) - 1) != []


def test_one_session_restores_its_messages(device: Device, history: History) -> None:
    """The key of a session decrypts the messages of the session and no others."""
    second = device.login(history.user)
    for room_id, room in history.plain_texts.items():
        for session_id, texts in room.items():
            path = keys_path(history.version, room_id, session_id)
            rooms = {room_id: {session_id: accepted(second.api.get(path))}}
            sessions = restored(rooms, history.private)
            assert decrypted(second, room_id, sessions) == (sorted(texts), 4)


def test_a_second_device_trusts_the_version(device: Device) -> None:
    """The signature of auth_data is still valid in another device's download."""
    user = device.user
    private = private_key()
    device.create_backup(private)
    second = device.login(user)
    auth_data = second.api.info()["auth_data"]
    check_signature(auth_data, device.account, user.user_id, user.device_id)
    assert auth_data["public_key"] == public_key_of(private)


def test_another_private_key_decrypts_nothing(device: Device, history: History) -> None:
    """Stored keys can't be decrypted with another private key."""
    second = device.login(history.user)
    rooms = second.api.download(history.version)
    with pytest.raises(PkDecodeException):
        restored(rooms, private_key())


def test_a_better_export_replaces_a_worse_one(device: Device) -> None:
    """A session exported from an earlier message replaces an export from a later
    message."""
    private = private_key()
    version = device.create_backup(private)
    sender = device.sender(device.create_room())
    whole = sender.session()
    first, *_ = contents = [sender.encrypt(f"text {i}") for i in range(4)]
    assert back_up(device.api, version, [whole.at(2)]) == (1, 1)
    late = only_session(device, version, private)
    assert [late.decrypt(content) for content in contents[2:]] == ["text 2", "text 3"]
    with pytest.raises(MegolmDecryptionException):
        late.decrypt(first)
    assert back_up(device.api, version, [whole]) == (2, 1)
    assert only_session(device, version, private).decrypt(first) == "text 0"


def test_a_worse_export_does_not_replace_a_better_one(
    device: Device,
) -> None:
    """A session exported from a later message does not replace an earlier export."""
    private = private_key()
    version = device.create_backup(private)
    sender = device.sender(device.create_room())
    whole = sender.session()
    contents = [sender.encrypt(f"text {i}") for i in range(4)]
    assert back_up(device.api, version, [whole]) == (1, 1)
    before = device.api.download(version)
    for later in (1, 3):
        assert back_up(device.api, version, [whole.at(later)]) == (1, 1)
    same(device.api.download(version), before)
    texts = [only_session(device, version, private).decrypt(c) for c in contents]
    assert texts == ["text 0", "text 1", "text 2", "text 3"]


def test_an_export_of_another_device_changes_nothing(device: Device) -> None:
    """Another device's export of the same session leaves the first export unchanged.

    This holds if the other device's export starts later, and if both start at the same
    message.
    """
    private = private_key()
    version = device.create_backup(private)
    sender = device.sender(device.create_room())
    early = sender.session()
    first = sender.encrypt("for the first device alone")
    late = sender.session()
    assert (early.session_id, late.first_index) == (late.session_id, 1)
    assert back_up(device.api, version, [early]) == (1, 1)
    before = device.api.download(version)
    second = device.login(device.user)
    for session in (late, early):
        assert back_up(second.api, version, [session]) == (1, 1)
    same(second.api.download(version), before)
    text = only_session(second, version, private).decrypt(first)
    assert text == "for the first device alone"


def test_a_verified_export_ranks_above_an_unverified_one(device: Device) -> None:
    """A verified export ranks above an unverified export, even of an earlier
    message."""
    private = private_key()
    version = device.create_backup(private)
    whole = device.sender(device.create_room()).session()
    assert back_up(device.api, version, [whole]) == (1, 1)
    assert back_up(device.api, version, [whole.at(3)], verified=True) == (2, 1)
    assert only_session(device, version, private).first_index == 3
    assert back_up(device.api, version, [whole]) == (2, 1)
    assert back_up(device.api, version, [whole], verified=True) == (3, 1)
    assert only_session(device, version, private).first_index == 0


def test_a_large_backup_goes_up_in_batches_and_down_in_one(device: Device) -> None:
    """Each key uploaded in Element's batches of 100 is restored by one download."""
    private = private_key()
    version = device.create_backup(private)
    room_ids = [f"!room{number}:test.example" for number in range(7)]
    senders = [Sender(device.account, room_ids[i % 7]) for i in range(6 * BATCH + 1)]
    sessions = [sender.session() for sender in senders]
    contents = [sender.encrypt(sender.outbound.session_id) for sender in senders]
    assert back_up(device.api, version, sessions) == (7, len(sessions))
    found = restored(device.api.download(version), private)
    texts = [found[content["session_id"]].decrypt(content) for content in contents]
    assert texts == [content["session_id"] for content in contents]


def test_a_reset_deletes_all_versions(device: Device) -> None:
    """After Element's reset all old versions and keys are gone.

    A new version then starts empty and accepts the same session.
    """
    private = private_key()
    old_versions = [device.create_backup(private), device.create_backup(private)]
    sender = device.sender(device.create_room())
    session = sender.session()
    content = sender.encrypt("still here")
    back_up(device.api, old_versions[1], [session])
    assert reset(device.api) == old_versions[::-1]
    new_private = private_key()
    new_version = device.create_backup(new_private)
    assert int(new_version) > int(old_versions[1])
    for version in old_versions:
        check_unknown(device.api, version, session)
    path = keys_path(new_version, session.room_id, session.session_id)
    refused(device.api.get(path), 404, "M_NOT_FOUND", error=NO_KEY)
    assert device.api.download(new_version) == {}
    assert back_up(device.api, new_version, [session]) == (1, 1)
    found = only_session(device, new_version, new_private)
    assert found.decrypt(content) == "still here"


def check_unknown(api: Api, version: str, session: Session) -> None:
    """Check that each request for a version is answered 404 for an unknown version."""
    room_id, session_id = session.room_id, session.session_id
    paths = [
        version_path(version),
        keys_path(version),
        keys_path(version, room_id),
        keys_path(version, room_id, session_id),
    ]
    for path in paths:
        refused(api.get(path), 404, "M_NOT_FOUND", error=NO_VERSION, row=path)
    answer = api.put(keys_path(version), {"rooms": {}})
    refused(answer, 404, "M_NOT_FOUND", error=NO_VERSION)
