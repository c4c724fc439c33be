"""The parser and the servlets refuse invalid inputs properly and store valid ones
exactly."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from synapse_roomkeys import identifiers, wire
from synapse_roomkeys.errors import RoomKeysError
from synapse_roomkeys.service.logs import MAX_LINE, JsonFormatter, TextFormatter
from synapse_roomkeys.types import Limits

from ..contract.base import ALGORITHM, PREFIX, Answer, keys_path, same, wrapped
from ..memory import MemoryHost, read_answer
from . import SOAK
from .inputs import Inputs
from .oracle import check_accepted, check_refusal, fields_of, kept, keys_of, read

#: Numbers of random inputs for the parser alone, for the servlets, and for uploads that
#: are stored and downloaded.
PARSED, ANSWERED, UPLOADED = (
    (500_000, 300_000, 100_000) if SOAK else (20_000, 8_000, 2_000)
)
#: Number of inputs tried by atheris.
ATHERIS_RUNS = 2_000_000
REPOSITORY = Path(__file__).parents[2]
#: Number of requests after which the servlets get a new database, because random
#: requests delete the versions.
REQUESTS_PER_DATABASE = 50
#: Least fraction of accepted inputs, and of refused inputs; with fewer, the test would
#: be meaningless.
MIN_FRACTION = 0.2
SETTINGS = settings(
    max_examples=20_000 if SOAK else 400,
    derandomize=not SOAK,
    database=None,
    deadline=None,
    print_blob=True,
    suppress_health_check=list(HealthCheck),
)
LIMITS = Limits()


class LogLineChecker(logging.Handler):
    """Log handler that raises on errors, tracebacks, long lines and control
    characters."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self._formatters = (TextFormatter(), JsonFormatter())

    def handle(self, record: logging.LogRecord) -> bool:
        """Check a record. Unlike ``emit``, whose exceptions logging swallows, this
        raises."""
        assert record.levelno < logging.ERROR, record.getMessage()
        assert record.exc_info is None, record.getMessage()
        assert len(record.getMessage().encode()) <= MAX_LINE, record.getMessage()
        for formatter in self._formatters:
            line = formatter.format(record)
            assert len(line.encode()) <= MAX_LINE
            assert line.isascii() and line.isprintable(), line
        return True


@pytest.fixture(autouse=True)
def check_log_lines() -> Iterator[None]:
    """Check every line logged by the plugin during a test."""
    logger = logging.getLogger("synapse_roomkeys")
    handler, level = LogLineChecker(), logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    yield
    logger.setLevel(level)
    logger.removeHandler(handler)


def try_parsers(inputs: Inputs) -> bool:
    """Parse one set of random inputs with each parser.

    A parser must refuse with an error of the contract or return exactly the values in
    the input.

    Returns:
        Whether the upload was accepted.
    """
    room_id, session_id = inputs.scope()
    body = inputs.upload(room_id, session_id)
    try:
        check_accepted(
            wire.parse_upload(body, room_id, session_id, LIMITS),
            *(body, room_id, session_id),
        )
        accepted = True
    except RoomKeysError as error:
        check_refusal(error)
        accepted = False
    body = inputs.version_info()
    for parse, version in (
        (wire.parse_new_version, lambda sent: None),
        (wire.parse_version_info, lambda sent: sent.get("version")),
    ):
        try:
            info = parse(body, LIMITS)
            sent = read(body)
            same(kept(info.auth_data), sent["auth_data"])
            assert info.auth_data != "null" and "\0" not in info.algorithm
            assert (info.algorithm, info.version) == (sent["algorithm"], version(sent))
        except RoomKeysError as error:
            check_refusal(error)
    text = inputs.version()
    try:
        assert 0 < identifiers.parse_version(text) < 2**63 and str(int(text)) == text
    except RoomKeysError as error:
        check_refusal(error)
    text = inputs.id()
    try:
        identifiers.check_id("Room", text)
        assert 0 < len(text.encode()) <= 255 and "\0" not in text
    except RoomKeysError as error:
        check_refusal(error)
    return accepted


@given(st.randoms(use_true_random=False))
@SETTINGS
def test_the_parser(random: Random) -> None:
    """Each parser refuses an input with an error of the contract or returns exactly the
    values sent; hypothesis shrinks a failing input."""
    try_parsers(Inputs(random))


def test_the_parser_in_bulk() -> None:
    """The same holds for many more inputs; a failure names the input's seed."""
    start = Random().getrandbits(60) if SOAK else 0
    accepted = 0
    for seed in range(start, start + PARSED):
        try:
            accepted += try_parsers(Inputs(Random(seed)))
        except Exception as error:
            raise AssertionError(f"seed {seed}") from error
    print(f"{4 * PARSED} inputs, {accepted} uploads of {PARSED} accepted")
    assert MIN_FRACTION < accepted / PARSED < 1 - MIN_FRACTION


if SOAK:

    def test_the_parser_with_atheris(tmp_path: Path) -> None:
        """The same holds for inputs derived by atheris from the code coverage."""
        done = subprocess.run(
            [
                sys.executable,
                "-m",
                "tests.reliability.fuzz_atheris",
                str(ATHERIS_RUNS),
                tmp_path,
            ],
            cwd=REPOSITORY,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-5000:]
        assert f"Done {ATHERIS_RUNS} runs in" in done.stderr, done.stderr[-5000:]


class Servlets:
    """A server in memory, and two versions of a user."""

    def __init__(self) -> None:
        self.host = MemoryHost()
        # Without a timeout: the reactor doesn't run, and timers would keep every
        # connection in memory.
        self.host.site.timeOut = None
        self.token = self.host.new_user().access_token
        self.versions = (self.new_version(), self.new_version())

    def new_version(self) -> str:
        """Create a version and return the number; the new version becomes the current
        version."""
        body = json.dumps({"algorithm": ALGORITHM, "auth_data": {}}).encode()
        version: str = self.answer("POST", PREFIX + "/version", body).json["version"]
        return version

    def answer(self, method: str, target: str, body: bytes) -> Answer:
        """Send a request and return the answer; fail if there is none."""
        sent = self.host.send(method, target, token=self.token, body=body)
        answered: bytes = sent.value()  # type: ignore[no-untyped-call]
        return read_answer(answered, method)


def check_answer(method: str, target: str, answer: Answer, token: str) -> None:
    """Check an answer: no server error, and errors as JSON with errcode and message and
    without the token."""
    where = f"{method} {target[:200]}: {answer}"
    assert answer.status < 500, where
    assert token.encode() not in answer.body, where
    assert b"Traceback" not in answer.body, where
    if answer.status == 204:
        assert method == "OPTIONS" and not answer.body, where
        return
    assert answer.headers["content-type"] == "application/json", where
    if method == "HEAD":
        assert not answer.body, where
        return
    value = answer.json
    if answer.status >= 400:
        assert value["errcode"].startswith("M_"), where
        assert isinstance(value["error"], str) and value["error"], where
        assert len(answer.body) < MAX_LINE, where
    else:
        assert answer.status == 200 and "errcode" not in value, where


def test_the_servlets() -> None:
    """Random whole requests get no server error, and every error is JSON as the
    contract says."""
    start = Random().getrandbits(60) if SOAK else 0
    statuses: dict[int, int] = {}
    servlets = Servlets()
    for seed in range(start, start + ANSWERED):
        if (seed - start) % REQUESTS_PER_DATABASE == 0:
            servlets = Servlets()
        method, target, body = Inputs(Random(seed), servlets.versions).request()
        try:
            answer = servlets.answer(method, target, body)
            check_answer(method, target, answer, servlets.token)
        except Exception as error:
            raise AssertionError(f"seed {seed}: {method} {target[:300]}") from error
        statuses[answer.status] = statuses.get(answer.status, 0) + 1
    print(f"{ANSWERED} requests: {dict(sorted(statuses.items()))}")
    assert MIN_FRACTION < statuses[200] / ANSWERED < 1 - MIN_FRACTION
    assert statuses.keys() >= {200, 204, 400, 403, 404, 405}


def test_uploads_round_trip() -> None:
    """An accepted upload is downloaded as the same JSON values; a refused upload leaves
    the backup empty."""
    start = Random().getrandbits(60) if SOAK else 0
    accepted = 0
    for seed in range(start, start + UPLOADED):
        if (seed - start) % REQUESTS_PER_DATABASE == 0:
            servlets = Servlets()
        inputs = Inputs(Random(seed))
        room_id, session_id = inputs.scope()
        body = inputs.upload(room_id, session_id)
        version = servlets.new_version()
        path = PREFIX + keys_path(version, room_id, session_id)
        answer = servlets.answer("PUT", path, body)
        got = servlets.answer("GET", PREFIX + keys_path(version), b"").json
        want: dict[str, Any] = {}
        if answer.status == 200:
            accepted += 1
            want = fields_of(keys_of(body, room_id, session_id))
        same(got, wrapped(want), f"seed {seed}: {body[:300]!r}: {answer}")
    print(f"{UPLOADED} uploads, {accepted} accepted")
    assert MIN_FRACTION < accepted / UPLOADED < 1 - MIN_FRACTION


@pytest.mark.parametrize("size", [65_536, 65_537, 10_485_760, 10_485_761])
def test_large_bodies(size: int) -> None:
    """A string of the largest allowed size is accepted; a larger string gets 413."""
    servlets = Servlets()
    before = b'{"first_message_index":0,"forwarded_count":0,"is_verified":true,'
    data = b'"' + b"x" * (size - 2) + b'"'
    target = PREFIX + keys_path(servlets.versions[1], "!r:h", "s")
    body = before + b'"session_data":' + data + b"}"
    answer = servlets.answer("PUT", target, body)
    check_answer("PUT", target, answer, servlets.token)
    assert answer.status == (200 if size <= LIMITS.max_session_data_bytes else 413)
