"""Programs of Debian's packages, fetched where they aren't installed."""

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
    """A program, and the environment that it finds its libraries in."""

    path: Path
    environment: Mapping[str, str]


@functools.cache
def locate(name: str, package: str) -> Program:
    """Locate a program, fetching its package where it isn't installed.

    Raises:
        StartFailed: it is not installed and can't be fetched.
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
    """Unpack a package of Debian's, and those it needs that are missing, aside.

    Nothing is installed: so no service is started, nothing needs to be removed, and
    anybody may do it.
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
    """Run one of the system's tools to its end."""
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
    """Give up if a tool has failed."""
    if done.returncode:
        raise StartFailed(f"{package} can't be fetched:\n{done.stdout}")
