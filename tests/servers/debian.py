"""Programs from Debian packages, downloaded where they are not installed."""

import functools
import os
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

import attrs

from .processes import StartFailed, make_directory

_TIMEOUT = 300.0
_SYSTEM_PATHS = "/usr/sbin:/usr/local/sbin"


@attrs.frozen
class Program:
    """A program, and the environment variables needed to find its libraries."""

    path: Path
    environment: Mapping[str, str]


@functools.cache
def locate(name: str, package: str) -> Program:
    """Locate a program, and download its Debian package if it is not installed.

    Args:
        name: the file name of the program.
        package: the Debian package that contains the program.

    Raises:
        StartFailed: the program is not installed and the package can't be downloaded.
    """
    search = f"{os.environ.get('PATH', os.defpath)}:{_SYSTEM_PATHS}"
    installed = shutil.which(name, path=search)
    if installed is not None:
        return Program(Path(installed), {})
    if shutil.which("apt-get") is None:
        raise StartFailed(
            f"{name} is not installed: install it, or run this on a Debian or Ubuntu,"
            " where its package is fetched"
        )
    root = _fetch(package)
    paths = [root / "usr" / folder / name for folder in ("sbin", "bin")]
    libraries = {str(path.parent) for path in root.rglob("*.so.*")}
    return Program(
        next(path for path in paths if path.exists()),
        {"LD_LIBRARY_PATH": ":".join(sorted(libraries))},
    )


@functools.cache
def _fetch(package: str) -> Path:
    """Download a Debian package and its missing dependencies, and unpack them.

    The files go to a temporary directory instead of being installed. Therefore no
    service is started, nothing has to be uninstalled later, and no root privileges are
    required.

    Returns:
        The directory that serves as the root of the unpacked packages.

    Raises:
        StartFailed: a tool has failed; the text holds the tool's output.
    """
    root = make_directory(f"{package}-program-")
    root.chmod(0o755)
    (root / "lists" / "partial").mkdir(parents=True)
    (root / "partial").mkdir()
    apt = ["apt-get", "-o", "Debug::NoLocking=1", "-o", "APT::Sandbox::User=root"]
    apt += ["-o", f"Dir::Cache={root}", "-o", f"Dir::Cache::archives={root}"]
    download = ["install", "--yes", "--download-only", "--no-install-recommends"]
    if _run([*apt, *download, package]).returncode:
        apt += ["-o", f"Dir::State::lists={root}/lists"]
        _check(_run([*apt, "update"]), package)
        _check(_run([*apt, *download, package]), package)
    for archive in root.glob("*.deb"):
        _check(_run(["dpkg-deb", "--extract", str(archive), str(root)]), package)
        archive.unlink()
    return root


def _run(command: list[str]) -> "subprocess.CompletedProcess[str]":
    """Run a system tool until its end, with standard output and error captured
    together."""
    return subprocess.run(
        command,
        env={**os.environ, "LC_ALL": "C", "DEBIAN_FRONTEND": "noninteractive"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=_TIMEOUT,
        check=False,
    )


def _check(done: "subprocess.CompletedProcess[str]", package: str) -> None:
    """Check that a tool has succeeded.

    Raises:
        StartFailed: the exit code isn't 0; the text names the package and holds the
            output.
    """
    if done.returncode:
        raise StartFailed(f"{package} can't be fetched:\n{done.stdout}")
