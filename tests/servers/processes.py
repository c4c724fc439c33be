"""Child processes, ports and directories that never outlive the harness."""

import atexit
import contextlib
import functools
import os
import pwd
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TypedDict, TypeVar

HOST = "127.0.0.1"
_GUARD_SCRIPT = Path(__file__).with_name("guard.py")

_lock = threading.Lock()
_chance = random.SystemRandom()
_picked: set[int] = set()

AnyServer = TypeVar("AnyServer", bound="Server")


class StartFailed(RuntimeError):
    """A server did not come up; the text holds what it printed."""


def _tell_guard(order: str) -> None:
    """Pass an order to the guard of this process, starting it when needed."""
    with _lock:
        orders = _guard().stdin
        assert orders is not None
        orders.write(order + "\n")
        orders.flush()


@functools.cache
def _guard() -> "subprocess.Popen[str]":
    """Start the guard in a session of its own, so that Ctrl-C spares it."""
    guard = subprocess.Popen(
        [sys.executable, "-I", str(_GUARD_SCRIPT)],
        cwd="/",
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        text=True,
    )
    atexit.register(_end_guard, guard, os.getpid())
    return guard


def _end_guard(guard: "subprocess.Popen[str]", owner: int) -> None:
    """Let the guard clean up before the interpreter exits."""
    if os.getpid() == owner and guard.stdin is not None:
        guard.stdin.close()
        guard.wait()


def free_port() -> int:
    """Pick a free port below the range that outgoing connections draw from.

    None is picked twice: a server may be stopped now and started again on its own. The
    choice doesn't follow the seeds that tests set.
    """
    while True:
        port = _chance.randrange(15000, 32000)
        if port in _picked:
            continue
        _picked.add(port)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind((HOST, port))
            return port


@contextlib.contextmanager
def temporary_directory(prefix: str) -> Iterator[Path]:
    """Yield a fresh directory that goes away even if this process is killed."""
    directory = make_directory(prefix)
    try:
        yield directory
    finally:
        remove_directory(directory)


def make_directory(prefix: str) -> Path:
    """Create a directory that the guard removes if nobody else does."""
    directory = Path(tempfile.mkdtemp(prefix=prefix)).resolve()
    _tell_guard(f"remove {directory}")
    return directory


def remove_directory(directory: Path) -> None:
    """Remove a directory made here."""
    shutil.rmtree(directory, ignore_errors=True)
    _tell_guard(f"keep {directory}")


class Identity(TypedDict):
    """Whom a child runs as, in the words of the standard library."""

    user: str | None
    group: int | None
    extra_groups: list[int] | None


def identity(user: str | None) -> Identity:
    """Describe a user to run a child as; nobody in particular means ourselves."""
    if user is None:
        return {"user": None, "group": None, "extra_groups": None}
    return {"user": user, "group": pwd.getpwnam(user).pw_gid, "extra_groups": []}


class Server:
    """Something that runs for as long as a with statement does."""

    def start(self) -> None:
        """Start it, and wait until it answers."""
        raise NotImplementedError

    def stop(self) -> None:
        """Stop it in order."""
        raise NotImplementedError

    def close(self) -> None:
        """Stop it for good, and leave nothing behind."""
        self.stop()

    def __enter__(self: AnyServer) -> AnyServer:
        """Start it."""
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Stop it for good."""
        self.close()


class Process:
    """A running child in a session of its own, its output kept in a file."""

    def __init__(
        self,
        command: Sequence[str],
        *,
        output: Path,
        cwd: Path,
        environment: Mapping[str, str] | None = None,
        user: str | None = None,
        orphan_signal: signal.Signals = signal.SIGKILL,
    ) -> None:
        """Start the command; the guard signals it if it is orphaned."""
        self._output = output
        with output.open("ab") as stream:
            self._output_start = stream.tell()
            self._child = subprocess.Popen(
                command,
                cwd=cwd,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                **identity(user),
            )
        _tell_guard(f"watch {self._child.pid} {orphan_signal.value}")

    @property
    def pid(self) -> int:
        """Identify the process to the system."""
        return self._child.pid

    def output(self) -> str:
        """Return what this process has printed so far."""
        with self._output.open("rb") as stream:
            stream.seek(self._output_start)
            return stream.read().decode(errors="replace")

    def poll(self) -> int | None:
        """Return the exit code once the process has ended."""
        known = self._child.returncode
        code = self._child.poll()
        if known is None and code is not None:
            _tell_guard(f"forget {self.pid}")
        return code

    def wait(self, timeout: float) -> int | None:
        """Return the exit code, or nothing if the process is still running."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._child.wait(timeout)
            _tell_guard(f"forget {self.pid}")
        return self._child.returncode

    def wait_until(self, ready: Callable[[], bool], timeout: float) -> None:
        """Wait for the process to be of use, and end it if it never is."""
        deadline = time.monotonic() + timeout
        while not ready():
            code = self.poll()
            if code is not None:
                raise StartFailed(f"exited with {code}:\n{self.output()}")
            if time.monotonic() > deadline:
                self.kill()
                raise StartFailed(f"not ready in {timeout} s:\n{self.output()}")
            time.sleep(0.02)

    def send(self, number: signal.Signals) -> None:
        """Send a signal, unless the process has already ended."""
        self._child.send_signal(number)

    def stop(self, number: signal.Signals, grace: float = 20.0) -> None:
        """Ask the process to end, and kill it if it takes too long."""
        self.send(number)
        if self.wait(grace) is None:
            self.kill()

    def kill(self) -> None:
        """End the process at once."""
        self.send(signal.SIGKILL)
        self.wait(30.0)
