"""The configuration of the service."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import attrs
import yaml
from twisted.trial.unittest import SynchronousTestCase

from synapse_roomkeys.config import OptionError
from synapse_roomkeys.homeserver import HomeserverOptions
from synapse_roomkeys.service.config import (
    OPTIONS,
    DatabaseConfig,
    ServiceConfig,
    example,
    load_config,
    load_database,
)
from synapse_roomkeys.types import Limits

URL = "https://matrix.example.org"
SECRET = "hunter2"
DEFAULTS = ServiceConfig(HomeserverOptions(URL))


class ConfigTests(SynchronousTestCase):
    """`load_config`."""

    def setUp(self) -> None:
        directory = TemporaryDirectory()
        self.addCleanup(directory.cleanup)
        self.directory = Path(directory.name)
        self.numbers = count()

    def file(self, content: str) -> Path:
        """A file with this content."""
        path = self.directory / f"{next(self.numbers)}.yaml"
        path.write_text(content)
        return path

    def load(self, content: Any = None, **variables: str) -> ServiceConfig:
        """What a file and the environment come to, beside the homeserver's address."""
        paths = [] if content is None else [self.file(yaml.safe_dump(content))]
        environ = {f"ROOMKEYS_{name}": value for name, value in variables.items()}
        return load_config(paths, {**environ, "PATH": "/bin"}, URL)

    def refused(self, content: Any, *names: str, **variables: str) -> None:
        """An error that names these in one line, and no secret."""
        error = self.assertRaises(OptionError, self.load, content, **variables)
        for name in names:
            self.assertIn(name, str(error))
        self.assertNotIn("\n", str(error))
        self.assertNotIn(SECRET, str(error))

    def test_only_the_homeserver_is_needed(self) -> None:
        """Everything else has a default."""
        self.assertEqual(load_config([], {}, URL), DEFAULTS)
        error = self.assertRaises(OptionError, load_config, [], {}, None)
        self.assertIn("homeserver.url", str(error))

    def test_the_example_is_the_defaults(self) -> None:
        """It names each option, with its default; one without is commented out."""
        path = self.file(example())
        self.assertEqual(load_config([path], {}, None), DEFAULTS)
        content = yaml.safe_load(example())
        for name in OPTIONS:
            value = content
            for key in name.split("."):
                if key not in value:
                    self.assertIn(f"\n  # {key}: ", example())
                    self.assertIsNone(getattr(DEFAULTS.limits, key))
                    break
                value = value[key]

    def test_all_options(self) -> None:
        """Each option of a file ends up where it belongs."""
        config = self.load(
            {
                "homeserver": {"timeout_seconds": 1, "cache_entries": 2},
                "database": {"name": "psycopg2", "args": {"user": "a", "cp_max": 3}},
                "listeners": ["unix:/run/a:mode=660", "systemd:domain=INET:index=0"],
                "metrics_listeners": ["tcp:9"],
                "trusted_proxies": ["10.0.0.0/8", "::1"],
                "log": {"format": "json", "level": "DEBUG"},
                "shutdown_seconds": 4,
                "stalled_download_seconds": 5,
                "limits": {"max_body_bytes": 6},
            }
        )
        self.assertEqual(
            attrs.evolve(config, trusted_proxies=()),
            ServiceConfig(
                HomeserverOptions(URL, timeout_seconds=1, cache_entries=2),
                DatabaseConfig("psycopg2", {"user": "a", "cp_max": 3}),
                ("unix:/run/a:mode=660", "systemd:domain=INET:index=0"),
                ("tcp:9",),
                (),
                "json",
                "DEBUG",
                4,
                5,
                Limits(max_body_bytes=6),
            ),
        )
        self.assertEqual(
            [str(network) for network in config.trusted_proxies],
            ["10.0.0.0/8", "::1/128"],
        )

    def test_each_option_has_a_variable(self) -> None:
        """The environment can say all that a file can."""
        values: Mapping[str, tuple[str, Any]] = {
            "homeserver.url": ("http://hs:8008/", "http://hs:8008"),
            "homeserver.has_guests": ("False", False),
            "database.name": ("psycopg2", "psycopg2"),
            "listeners": ("tcp:1, tcp:2", ("tcp:1", "tcp:2")),
            "metrics_listeners": ("tcp:3", ("tcp:3",)),
            "log.format": ("json", "json"),
            "log.level": ("ERROR", "ERROR"),
        }
        for name in OPTIONS:
            if name == "trusted_proxies":
                continue
            text, value = values.get(name, ("17", 17))
            variable = "ROOMKEYS_" + name.replace(".", "_").upper()
            url = None if name == "homeserver.url" else URL
            config: Any = load_config([], {variable: text}, url)
            found = attrs.asdict(config)
            for key in name.replace("log.", "log_").split("."):
                found = found[key]
            self.assertEqual(found, value, name)
        config = self.load(TRUSTED_PROXIES="10.0.0.0/8,192.168.1.1")
        self.assertEqual(len(config.trusted_proxies), 2)

    def test_the_arguments_of_the_database_have_variables(self) -> None:
        """Any of them, in lower case; only the pool's are numbers."""
        config = self.load(
            DATABASE_NAME="psycopg2",
            DATABASE_ARGS_PORT="5432",
            DATABASE_ARGS_PASSWORD="17",
            DATABASE_ARGS_CP_MAX="4",
        )
        args = {"port": "5432", "password": "17", "cp_max": 4}
        self.assertEqual(config.database, DatabaseConfig("psycopg2", args))
        self.assertNotIn("17", repr(config))

    def test_a_synapse_s_database_is_accepted(self) -> None:
        """The whole section can be copied: options of Synapse's that the service has no
        use for are left out, and the pool's numbers may be strings."""
        options = {
            "txn_limit": 10000,
            "allow_unsafe_locale": True,
            "synchronous_commit": False,
            "statement_timeout": 3600000,
            "idle_in_transaction_session_timeout": 300000,
            "data_stores": ["main"],
        }
        pool = {
            "cp_reconnect": True,
            "cp_noisy": True,
            "cp_name": "synapse",
            "cp_openfun": None,
            "cp_good_sql": "SELECT 1",
            "cp_min": "5",
            "cp_max": 20,
        }
        server = {"user": "a", "database": "b", "host": "c", "port": "5432"}
        section = {"name": "psycopg2", **options, "args": {**server, **pool}}
        path = self.file(yaml.safe_dump({"database": section}))
        config = load_database([path], {})
        args = {**server, "cp_min": 5, "cp_max": 20}
        self.assertEqual(config, DatabaseConfig("psycopg2", args))
        section = {"name": "sqlite3", **options, "args": {"database": "a.db", **pool}}
        path = self.file(yaml.safe_dump({"database": section}))
        config = load_database([path], {})
        self.assertEqual(config, DatabaseConfig("sqlite3", {"database": "a.db"}))

    def test_what_neither_synapse_nor_libpq_knows_is_named(self) -> None:
        """An option of the section, of the pool, or of the connection."""
        self.refused({"database": {"txn_limits": 1}}, "database.txn_limits")
        for argument in ("cp_size", "hots", "async", "cursor_factory"):
            database = {"name": "psycopg2", "args": {argument: 1}}
            self.refused({"database": database}, f"database.args.{argument}")

    def test_a_connection_string_is_checked(self) -> None:
        """A wrong one is refused before anything is connected to, with the name of the
        option and no part of the string."""
        for dsn in (
            f"host=h password=my {SECRET} pass",
            f"host=h password=my {SECRET}=pass",
            f"host=h password='{SECRET}",
            SECRET,
            f"postgresql://u:p@{SECRET}@h/db",
            f"postgresql://u:{SECRET}/p@h/db",
            f"postgresql://u:p%{SECRET}@h/db",
            f"postgresql://u:p@h/db?{SECRET}=1",
            f"postgresql://u:p@h:{SECRET}/db",
            f"postgresql://u:p@[{SECRET}/db",
        ):
            database = {"name": "psycopg2", "args": {"dsn": dsn}}
            self.refused(
                {"database": database}, "database.args.dsn: isn't a connection"
            )
            self.refused(
                None,
                "database.args.dsn: ",
                DATABASE_NAME="psycopg2",
                DATABASE_ARGS_DSN=dsn,
            )
        for name, value in (("host", f"u:{SECRET}@h"), ("port", SECRET)):
            database = {"name": "psycopg2", "args": {name: value}}
            self.refused({"database": database}, f"database.args.{name}: ")
        for dsn in ("host=@a,b port=1,2 password='a b'", "postgresql://u:p%40@h:1/db"):
            database = {"name": "psycopg2", "args": {"dsn": dsn}}
            path = self.file(yaml.safe_dump({"database": database}))
            self.assertEqual(load_database([path], {}).args, {"dsn": dsn})

    def test_the_end_of_a_password_is_no_name(self) -> None:
        """YAML takes the text after a comma for a name, which isn't shown. Nor is a
        password in the place of the name of its file."""
        path = self.file(
            f"database: {{name: psycopg2, args: {{password: a, {SECRET}}}}}"
        )
        error = self.assertRaises(OptionError, load_database, [path], {})
        self.assertNotIn(SECRET, str(error))
        self.assertIn("database.args: ", str(error))
        for variable in ("DATABASE_ARGS_PASSWORD_FILE", "DATABASE_ARGS_DSN_FILE"):
            self.refused(None, variable, **{variable: SECRET})

    def test_later_files_win_option_by_option(self) -> None:
        """And the environment wins over all of them, the command line over that."""
        first = self.file(
            "{log: {format: json, level: DEBUG}, shutdown_seconds: 1,"
            " database: {name: psycopg2, args: {user: a, host: b}}}"
        )
        second = self.file(
            "{log: {level: ERROR}, shutdown_seconds: 2, homeserver: {url: 'http://a'},"
            " database: {args: {host: c}}}"
        )
        variables = {
            "ROOMKEYS_SHUTDOWN_SECONDS": "3",
            "ROOMKEYS_HOMESERVER_URL": "http://b",
        }
        config = load_config([first, second], variables, None)
        self.assertEqual((config.log_format, config.log_level), ("json", "ERROR"))
        self.assertEqual(config.database.args, {"user": "a", "host": "c"})
        self.assertEqual(config.shutdown_seconds, 3)
        self.assertEqual(config.homeserver.url, "http://b")
        config = load_config([first, second], variables, "http://c")
        self.assertEqual(config.homeserver.url, "http://c")

    def test_a_value_can_be_in_a_file_of_its_own(self) -> None:
        """Without the newline at its end; not with the variable itself as well."""
        path = str(self.file(f"{SECRET}\n"))
        config = self.load(DATABASE_NAME="psycopg2", DATABASE_ARGS_PASSWORD_FILE=path)
        self.assertEqual(config.database.args, {"password": SECRET})
        config = self.load(SHUTDOWN_SECONDS_FILE=str(self.file("7\n")))
        self.assertEqual(config.shutdown_seconds, 7)
        both = {"DATABASE_ARGS_PASSWORD_FILE": path, "DATABASE_ARGS_PASSWORD": SECRET}
        self.refused(None, "ROOMKEYS_DATABASE_ARGS_PASSWORD_FILE", **both)
        self.refused(None, "ROOMKEYS_LOG_LEVEL_FILE", LOG_LEVEL_FILE="/nowhere")

    def test_what_is_unknown_is_named(self) -> None:
        """An option, a variable, or an argument of SQLite's."""
        self.refused({"listener": ["tcp:1"]}, "listener", "listeners")
        self.refused({"log": {"file": "a"}}, "log.file", "log.format")
        self.refused({"limits": {"max_body": 1}}, "limits.max_body")
        self.refused({"database": {"arguments": {}}}, "database.arguments")
        self.refused({"database": {"args": {"path": SECRET}}}, "database.args.path")
        self.refused(None, "ROOMKEYS_LISTENER", LISTENER="tcp:1")
        self.refused(None, "ROOMKEYS_LISTENER_FILE", LISTENER_FILE="/a")
        self.refused({1: 2}, "1: unknown")

    def test_what_kubernetes_sets_is_no_option(self) -> None:
        """A Service named roomkeys has variables like ours in all containers."""
        config = self.load(
            SERVICE_HOST="10.0.0.1",
            SERVICE_PORT="8009",
            SERVICE_PORT_HTTP="8009",
            PORT="tcp://10.0.0.1:8009",
            PORT_8009_TCP="tcp://10.0.0.1:8009",
            PORT_8009_TCP_ADDR="10.0.0.1",
            METRICS_PORT_9009_TCP_PROTO="tcp",
        )
        self.assertEqual(config, DEFAULTS)

    def test_a_wrong_value_is_named(self) -> None:
        """With the file or the variable that has it."""
        wrong: Mapping[str, list[Any]] = {
            "homeserver.url": [
                1,
                None,
                "matrix.org",
                "ftp://a",
                "https://",
                "http://[",
            ],
            "homeserver.has_guests": [0, 1, None, "no"],
            "homeserver.timeout_seconds": [0, -1, 1.5, True, None, "1"],
            "database.name": ["mysql", None, []],
            "listeners": [[], "tcp:1", [1], ["tcp:a"], ["ssl:1"], ["tcp"], ["unix:"]],
            "metrics_listeners": ["tcp:1", ["tcp:1:x=2"], ["unix:/a:mode=rw"]],
            "trusted_proxies": ["10.0.0.1", ["proxy"], ["10.0.0.1/8"]],
            "log.format": ["xml", 1],
            "log.level": ["info", None],
            "shutdown_seconds": [0],
            "limits.max_body_bytes": [0, "10M"],
            "database.args.password": [None, [SECRET], {"a": SECRET}],
            "database.args.cp_max": ["x", 0],
        }
        for name, values in wrong.items():
            for value in values:
                content = value
                for key in reversed(name.split(".")):
                    content = {key: content}
                path = self.file(yaml.safe_dump(content))
                error = self.assertRaises(
                    OptionError, load_config, [path], {}, None if "url" in name else URL
                )
                self.assertTrue(str(error).startswith(f"{path}: {name}: "), error)
                self.assertNotIn(SECRET, str(error))
        self.refused(None, "ROOMKEYS_LISTENERS", LISTENERS="")
        self.refused(None, "ROOMKEYS_LOG_FORMAT", LOG_FORMAT="xml")
        self.refused(None, "ROOMKEYS_SHUTDOWN_SECONDS", SHUTDOWN_SECONDS="1s")
        self.refused({"log": "json"}, "log: must be a mapping")
        self.refused(["log"], "must be a mapping")

    def test_an_address_has_no_more_than_it_needs(self) -> None:
        """No user, no query: nothing that could be a secret."""
        for url in (f"https://a:{SECRET}@hs", f"https://hs?a={SECRET}", "https://h s"):
            error = self.assertRaises(OptionError, load_config, [], {}, url)
            self.assertNotIn(SECRET, str(error))
        for url in ("http://[::1]:8008", "https://hs.example/below/", "http://hs_1"):
            config = load_config([], {}, url)
            self.assertEqual(config.homeserver.url, url.rstrip("/"))

    def test_a_file_that_cannot_be_read(self) -> None:
        """The error names it, and the line, but nothing that stands in it."""
        for content in (f"password: *{SECRET}", f"a: b: {SECRET}", "\x00", "a: ]"):
            path = self.file(content)
            error = self.assertRaises(OptionError, load_config, [path], {}, URL)
            self.assertIn(str(path), str(error))
            self.assertNotIn(SECRET, str(error))
            self.assertNotIn("\n", str(error))
        missing = self.directory / "missing.yaml"
        error = self.assertRaises(OptionError, load_config, [missing], {}, URL)
        self.assertIn(f"{missing}: can't be read: No such file", str(error))

    def test_an_empty_file_says_nothing(self) -> None:
        """Nor does one that holds comments."""
        self.assertEqual(load_config([self.file("# no\n")], {}, URL), DEFAULTS)

    def test_the_database_alone(self) -> None:
        """It needs no homeserver, but a name: the default depends on the working
        directory."""
        path = self.file("database: {args: {database: a.db}}")
        found = load_database([path], {})
        self.assertEqual(found, DatabaseConfig("sqlite3", {"database": "a.db"}))
        error = self.assertRaises(OptionError, load_database, [], {})
        self.assertEqual(error.option, "database.args")
