"""Apache httpd with the configuration in ``contrib/``."""

from collections.abc import Mapping
from pathlib import Path

from .debian import Program
from .processes import HOST
from .proxy import Proxy

#: Prefix of the configuration file: settings of Debian's apache2.conf, with all paths
#: in a single directory.
_MAIN = """\
ServerRoot {home}
ServerName localhost
PidFile {home}/apache2.pid
DefaultRuntimeDir {home}
ErrorLog "|/bin/cat"
LogLevel warn
Listen {host}:{port}
"""
#: Modules that the configuration file uses, their dependencies, and Debian's defaults.
_MODULES = [
    "mpm_event",
    "authz_core",
    "headers",
    "proxy",
    "proxy_http",
    "slotmem_shm",
    "proxy_balancer",
    "lbmethod_bybusyness",
    "unique_id",
]


class Apache(Proxy):
    """An Apache httpd as a reverse proxy in front of the service."""

    program = "apache2"
    package = "apache2-bin"
    config = "apache.conf"

    def _replacements(self) -> Mapping[str, str]:
        host = f"<VirtualHost {HOST}:{self.port}>"
        return {**super()._replacements(), "<VirtualHost *:80>": host}

    def _write_config(self, home: Path, text: str) -> None:
        main = _MAIN.format(home=home, host=HOST, port=self.port)
        (home / "apache2.conf").write_text(main + text)

    def _command(self, program: Program, home: Path) -> list[str]:
        modules = program.path.parents[1] / "lib" / "apache2" / "modules"
        loaded = (
            f"LoadModule {name}_module {modules}/mod_{name}.so" for name in _MODULES
        )
        command = [str(program.path), "-DFOREGROUND"]
        for directive in loaded:
            command += ["-C", directive]
        return [*command, "-f", str(home / "apache2.conf")]
