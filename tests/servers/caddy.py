"""Caddy with the configuration in ``contrib/``."""

from collections.abc import Mapping
from pathlib import Path

from .debian import Program
from .proxy import Proxy

#: Prefix of the configuration file: no admin port, no certificates.
_OPTIONS = """\
{
	admin off
	auto_https off
}
"""


class Caddy(Proxy):
    """A Caddy as a reverse proxy in front of the service."""

    program = "caddy"
    package = "caddy"
    config = "Caddyfile"

    def _replacements(self) -> Mapping[str, str]:
        return {**super()._replacements(), "matrix.example.org": self.url}

    def _write_config(self, home: Path, text: str) -> None:
        (home / "Caddyfile").write_text(_OPTIONS + text)

    def _command(self, program: Program, home: Path) -> list[str]:
        return [str(program.path), "run", "--config", str(home / "Caddyfile")]
