"""HAProxy with the configuration in ``contrib/``."""

from collections.abc import Mapping
from pathlib import Path

from .debian import Program
from .processes import HOST
from .proxy import Proxy


class HaProxy(Proxy):
    """A HAProxy as a reverse proxy in front of the service."""

    program = "haproxy"
    package = "haproxy"
    config = "haproxy.cfg"

    def _replacements(self) -> Mapping[str, str]:
        return {**super()._replacements(), "bind :80\n": f"bind {HOST}:{self.port}\n"}

    def _write_config(self, home: Path, text: str) -> None:
        (home / "haproxy.cfg").write_text(text)

    def _command(self, program: Program, home: Path) -> list[str]:
        return [str(program.path), "-db", "-f", str(home / "haproxy.cfg")]
