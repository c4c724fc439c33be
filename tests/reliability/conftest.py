"""Fixtures for the tests of failing databases."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from ..servers.fake_homeserver import Homeserver
from .faults import Serve, serving


@pytest.fixture
def serve(homeserver: Homeserver, tmp_path: Path) -> Iterator[Serve]:
    """A function that starts the service on a database."""
    with serving(homeserver, tmp_path / "service") as serve:
        yield serve
