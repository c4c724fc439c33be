"""Child processes, ports and directories that end with the test process."""

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

#: Serialises commands to the guard, which several threads may send.
_lock = threading.Lock()
_random = random.SystemRandom()
_returned_ports: set[int] = set()

AnyServer = TypeVar("AnyServer", bound="Server")


class StartFailed(RuntimeError):
    """Error for a server that did not start; the text holds the server's output."""


def _command_guard(command: str) -> None:
    """Write one command to this process's guard, and start the guard if needed."""
    with _lock:
        commands = _guard().stdin
        assert commands is not None
        commands.write(command + "\n")
        commands.flush()


@functools.cache
def _guard() -> "subprocess.Popen[str]":
    """Start the guard in a session of its own, out of reach of Ctrl-C."""
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
    """Close the guard's standard input and wait until the guard has cleaned up.

    Args:
        guard: the guard process.
        owner: the pid that started the guard; forked children must not end the guard.
    """
    if os.getpid() == owner and guard.stdin is not None:
        guard.stdin.close()
        guard.wait()


def free_port() -> int:
    """Return a free port below the range of ephemeral ports.

    No port is returned twice, because a stopped server may start again on its port
    later. The choice is independent of the random seeds that tests set.
    """
    while True:
        port = _random.randrange(15000, 32000)
        if port in _returned_ports:
            continue
        _returned_ports.add(port)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind((HOST, port))
            return port


@contextlib.contextmanager
def temporary_directory(prefix: str) -> Iterator[Path]:
    """Create a directory and delete it at the end of the context.

    The guard deletes the directory if this process is killed.
    """
    directory = make_directory(prefix)
    try:
        yield directory
    finally:
        remove_directory(directory)


def make_directory(prefix: str) -> Path:
    """Create a directory, which the guard deletes at the end unless removed earlier."""
    directory = Path(tempfile.mkdtemp(prefix=prefix)).resolve()
    _command_guard(f"remove {directory}")
    return directory


def remove_directory(directory: Path) -> None:
    """Delete a directory created by `make_directory`."""
    shutil.rmtree(directory, ignore_errors=True)
    _command_guard(f"keep {directory}")


class Identity(TypedDict):
    """Arguments of `subprocess.Popen` for the user that a child runs as."""

    user: str | None
    group: int | None
    extra_groups: list[int] | None


def identity(user: str | None) -> Identity:
    """Build the arguments to run a child as a user, or as the current user for None."""
    if user is None:
        return {"user": None, "group": None, "extra_groups": None}
    return {"user": user, "group": pwd.getpwnam(user).pw_gid, "extra_groups": []}


class Server:
    """A server that runs for the duration of a with statement."""

    def start(self) -> None:
        """Start the server and wait until the server answers."""
        raise NotImplementedError

    def stop(self) -> None:
        """Stop the server by its ordinary signal."""
        raise NotImplementedError

    def close(self) -> None:
        """Stop the server for good and delete its files."""
        self.stop()

    def __enter__(self: AnyServer) -> AnyServer:
        """Start the server."""
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Stop the server for good."""
        self.close()


class Process:
    """A child process in a session of its own, with its output in a file."""

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
        """Start the command.

        Args:
            command: the program and its arguments.
            output: the file to which standard output and error are appended.
            cwd: the working directory.
            environment: the environment variables, or None for those of this process.
            user: the user to run as, or None for the current user.
            orphan_signal: the signal that the guard sends if this process ends first.
        """
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
        _command_guard(f"watch {self._child.pid} {orphan_signal.value}")

    @property
    def pid(self) -> int:
        """The process id."""
        return self._child.pid

    def output(self) -> str:
        """Return the output since the start of this process, without earlier runs."""
        with self._output.open("rb") as stream:
            stream.seek(self._output_start)
            return stream.read().decode(errors="replace")

    def poll(self) -> int | None:
        """Return the exit code, or None while the process is running."""
        known = self._child.returncode
        code = self._child.poll()
        if known is None and code is not None:
            _command_guard(f"forget {self.pid}")
        return code

    def wait(self, timeout: float) -> int | None:
        """Wait for the end; return the exit code, or None after `timeout` seconds."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._child.wait(timeout)
            _command_guard(f"forget {self.pid}")
        return self._child.returncode

    def wait_until(self, ready: Callable[[], bool], timeout: float) -> None:
        """Wait until a condition holds.

        Args:
            ready: returns whether the process is ready.
            timeout: seconds after which the process is killed.

        Raises:
            StartFailed: the process has ended or the timeout has passed; the text holds
                the output.
        """
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
        """Send a signal; no effect on a process that has ended."""
        self._child.send_signal(number)

    def stop(self, number: signal.Signals, grace: float = 20.0) -> None:
        """Send a signal, and kill the process if still running after `grace`
        seconds."""
        self.send(number)
        if self.wait(grace) is None:
            self.kill()

    def kill(self) -> None:
        """Kill the process with SIGKILL and wait for its end."""
        self.send(signal.SIGKILL)
        self.wait(30.0)
