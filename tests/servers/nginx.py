"""nginx with the configuration in ``contrib/``."""

from collections.abc import Mapping
from pathlib import Path

from .debian import Program
from .processes import HOST
from .proxy import Proxy

#: Main configuration, which includes the file of ``contrib/``: settings of Debian's
#: nginx.conf, with all paths in one directory.
_MAIN = """\
daemon off;
worker_processes 1;
pid nginx.pid;
error_log stderr warn;
events {{ worker_connections 1024; }}
http {{
    access_log off;
    client_body_temp_path {home}/temporary;
    proxy_temp_path {home}/temporary;
    fastcgi_temp_path {home}/temporary;
    uwsgi_temp_path {home}/temporary;
    scgi_temp_path {home}/temporary;
    include {home}/site.conf;
}}
"""


class Nginx(Proxy):
    """An nginx as a reverse proxy in front of the service."""

    program = "nginx"
    package = "nginx"
    config = "nginx.conf"

    def _replacements(self) -> Mapping[str, str]:
        listen = f"listen {HOST}:{self.port};"
        return {**super()._replacements(), "listen 80;": listen}

    def _write_config(self, home: Path, text: str) -> None:
        (home / "temporary").mkdir()
        (home / "site.conf").write_text(text)
        (home / "nginx.conf").write_text(_MAIN.format(home=home))

    def _command(self, program: Program, home: Path) -> list[str]:
        paths = ["-p", str(home), "-c", str(home / "nginx.conf"), "-e", "stderr"]
        return [str(program.path), *paths]
