"""Tests of the service's configuration."""

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
    AdminConfig,
    DatabaseConfig,
    LogConfig,
    ServiceConfig,
    example,
    load_config,
    load_database,
    load_homeserver,
)
from synapse_roomkeys.service.endpoints import Endpoint
from synapse_roomkeys.types import Limits

URL = "https://matrix.example.org"
SECRET = "hunter2"
DEFAULTS = ServiceConfig(HomeserverOptions(URL))


class ConfigTests(SynchronousTestCase):
    """Tests of `load_config` and `load_database`."""

    def setUp(self) -> None:
        directory = TemporaryDirectory()
        self.addCleanup(directory.cleanup)
        self.directory = Path(directory.name)
        self.numbers = count()

    def file(self, content: str) -> Path:
        """Create a file with this content and return its path."""
        path = self.directory / f"{next(self.numbers)}.yaml"
        path.write_text(content)
        return path

    def load(self, content: Any = None, **variables: str) -> ServiceConfig:
        """Load a file and environment variables, with the homeserver's address
        given."""
        paths = [] if content is None else [self.file(yaml.safe_dump(content))]
        environ = {f"ROOMKEYS_{name}": value for name, value in variables.items()}
        return load_config(paths, {**environ, "PATH": "/bin"}, URL)

    def refused(self, content: Any, *names: str, **variables: str) -> None:
        """Check that loading fails with a single-line error that contains these names
        but no secret."""
        error = self.assertRaises(OptionError, self.load, content, **variables)
        for name in names:
            self.assertIn(name, str(error))
        self.assertNotIn("\n", str(error))
        self.assertNotIn(SECRET, str(error))

    def test_only_the_homeserver_url_is_required(self) -> None:
        """Every option but the URL of the homeserver has a default."""
        self.assertEqual(load_config([], {}, URL), DEFAULTS)
        error = self.assertRaises(OptionError, load_config, [], {}, None)
        self.assertIn("homeserver.url", str(error))

    def test_the_example_names_every_option_and_default(self) -> None:
        """The example names every option with its default; an option without a default
        is commented out."""
        path = self.file(example())
        self.assertEqual(load_config([path], {}, None), DEFAULTS)
        content = yaml.safe_load(example())
        for name in OPTIONS:
            value = content
            for key in name.split("."):
                if key not in value:
                    self.assertIn(f"\n  # {key}: ", example())
                    section = attrs.asdict(DEFAULTS)[name.partition(".")[0]]
                    self.assertIsNone(section[key])
                    break
                value = value[key]

    def test_every_option_is_parsed(self) -> None:
        """Each option of a file sets its own field of `ServiceConfig`."""
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
                "admin": {"listeners": ["tcp:7"], "token_path": "/token"},
            }
        )
        self.assertEqual(
            attrs.evolve(config, trusted_proxies=()),
            ServiceConfig(
                HomeserverOptions(URL, timeout_seconds=1, cache_entries=2),
                DatabaseConfig("psycopg2", {"user": "a", "cp_max": 3}),
                (
                    Endpoint("unix:/run/a:mode=660"),
                    Endpoint("systemd:domain=INET:index=0"),
                ),
                (Endpoint("tcp:9"),),
                (),
                LogConfig("json", "DEBUG"),
                4,
                5,
                Limits(max_body_bytes=6),
                admin=AdminConfig((Endpoint("tcp:7"),), "/token"),
            ),
        )
        self.assertEqual(
            [str(network) for network in config.trusted_proxies],
            ["10.0.0.0/8", "::1/128"],
        )

    def test_each_option_has_a_variable(self) -> None:
        """Each option of a file can be set by an environment variable."""
        values: Mapping[str, tuple[str, Any]] = {
            "homeserver.url": ("http://hs:8008/", "http://hs:8008"),
            "homeserver.has_guests": ("False", False),
            "database.name": ("psycopg2", "psycopg2"),
            "listeners": ("tcp:1, tcp:2", ("tcp:1", "tcp:2")),
            "metrics_listeners": ("tcp:3", ("tcp:3",)),
            "log.format": ("json", "json"),
            "log.level": ("ERROR", "ERROR"),
            "retention.keep_replaced": ("off", "off"),
            "admin.listeners": ("", ()),
            "admin.token_path": ("/token", "/token"),
            "admin.synapse_admins": ("true", True),
        }
        for name in OPTIONS:
            if name == "trusted_proxies":
                continue
            text, value = values.get(name, ("17", 17))
            variable = "ROOMKEYS_" + name.replace(".", "_").upper()
            url = None if name == "homeserver.url" else URL
            config: Any = load_config([], {variable: text}, url)
            found = attrs.asdict(config)
            for key in name.split("."):
                found = found[key]
            self.assertEqual(found, value, name)
        config = self.load(TRUSTED_PROXIES="10.0.0.0/8,192.168.1.1")
        self.assertEqual(len(config.trusted_proxies), 2)

    def test_operators_need_an_authentication(self) -> None:
        """Listeners for operators are an error unless an option says who may use
        them."""
        listeners = {"listeners": ["tcp:7"]}
        error = self.assertRaises(OptionError, self.load, {"admin": listeners})
        self.assertEqual(error.option, "admin.listeners")
        for option in ({"token_path": "/token"}, {"synapse_admins": True}):
            self.load({"admin": {**listeners, **option}})

    def test_the_arguments_of_the_database_have_variables(self) -> None:
        """Each database argument can be set by a variable, in lower case; only the
        sizes of the pool become numbers."""
        config = self.load(
            DATABASE_NAME="psycopg2",
            DATABASE_ARGS_PORT="5432",
            DATABASE_ARGS_PASSWORD="17",
            DATABASE_ARGS_CP_MAX="4",
        )
        args = {"port": "5432", "password": "17", "cp_max": 4}
        self.assertEqual(config.database, DatabaseConfig("psycopg2", args))
        self.assertNotIn("17", repr(config))

    def test_a_database_section_of_synapse_is_accepted(self) -> None:
        """A database section copied from Synapse is accepted: options that only Synapse
        uses are ignored, and pool sizes may be strings."""
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

    def test_unknown_database_options_are_named(self) -> None:
        """An option of the database section, of the pool or of the connection that
        neither Synapse nor libpq knows is an error that names the option."""
        self.refused({"database": {"txn_limits": 1}}, "database.txn_limits")
        for argument in ("cp_size", "hots", "async", "cursor_factory"):
            database = {"name": "psycopg2", "args": {argument: 1}}
            self.refused({"database": database}, f"database.args.{argument}")

    def test_a_connection_string_is_checked(self) -> None:
        """A malformed connection string is refused before any connection is made, with
        an error that names the option and quotes no part of the string."""
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

    def test_no_part_of_a_password_is_quoted_as_a_name(self) -> None:
        """A text after a comma in an unquoted YAML password, which YAML parses as a
        name, is not quoted in the error, and neither is a password given as the name of
        its file."""
        path = self.file(
            f"database: {{name: psycopg2, args: {{password: a, {SECRET}}}}}"
        )
        error = self.assertRaises(OptionError, load_database, [path], {})
        self.assertNotIn(SECRET, str(error))
        self.assertIn("database.args: ", str(error))
        for variable in ("DATABASE_ARGS_PASSWORD_FILE", "DATABASE_ARGS_DSN_FILE"):
            self.refused(None, variable, **{variable: SECRET})

    def test_later_files_override_single_options(self) -> None:
        """A later file overrides single options of an earlier file, the environment
        overrides all files, and the command line overrides the environment."""
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
        self.assertEqual((config.log.format, config.log.level), ("json", "ERROR"))
        self.assertEqual(config.database.args, {"user": "a", "host": "c"})
        self.assertEqual(config.shutdown_seconds, 3)
        self.assertEqual(config.homeserver.url, "http://b")
        config = load_config([first, second], variables, "http://c")
        self.assertEqual(config.homeserver.url, "http://c")

    def test_a_value_can_be_read_from_a_file(self) -> None:
        """A variable with the suffix _FILE reads the option's value from a file,
        without the final newline; setting both variables is an error."""
        path = str(self.file(f"{SECRET}\n"))
        config = self.load(DATABASE_NAME="psycopg2", DATABASE_ARGS_PASSWORD_FILE=path)
        self.assertEqual(config.database.args, {"password": SECRET})
        config = self.load(SHUTDOWN_SECONDS_FILE=str(self.file("7\n")))
        self.assertEqual(config.shutdown_seconds, 7)
        both = {"DATABASE_ARGS_PASSWORD_FILE": path, "DATABASE_ARGS_PASSWORD": SECRET}
        self.refused(None, "ROOMKEYS_DATABASE_ARGS_PASSWORD_FILE", **both)
        self.refused(None, "ROOMKEYS_LOG_LEVEL_FILE", LOG_LEVEL_FILE="/nowhere")

    def test_unknown_options_and_variables_are_named(self) -> None:
        """The error for an unknown option, variable or argument of SQLite names the
        option, variable or argument."""
        self.refused({"listener": ["tcp:1"]}, "listener", "listeners")
        self.refused({"log": {"file": "a"}}, "log.file", "log.format")
        self.refused({"limits": {"max_body": 1}}, "limits.max_body")
        self.refused({"database": {"arguments": {}}}, "database.arguments")
        self.refused({"database": {"args": {"path": SECRET}}}, "database.args.path")
        self.refused(None, "ROOMKEYS_LISTENER", LISTENER="tcp:1")
        self.refused(None, "ROOMKEYS_LISTENER_FILE", LISTENER_FILE="/a")
        self.refused({1: 2}, "1: unknown")

    def test_variables_of_kubernetes_are_ignored(self) -> None:
        """The variables that Kubernetes sets in all containers for a Service named
        roomkeys are not taken for options."""
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
        """A wrong value is an error that names the option and the file or variable of
        the value."""
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
            "limits.max_user_keys": [0, None],
            "retention.record_days": [-1, None, "1"],
            "retention.keep_replaced": ["some", None],
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
        self.refused(None, "ROOMKEYS_HOMESERVER_HAS_GUESTS", HOMESERVER_HAS_GUESTS="1")
        self.refused(None, "ROOMKEYS_SHUTDOWN_SECONDS", SHUTDOWN_SECONDS="1s")
        self.refused({"log": "json"}, "log: must be a mapping")
        self.refused(["log"], "must be a mapping")

    def test_a_homeserver_url_holds_no_credentials(self) -> None:
        """A homeserver URL with a user, a query or blanks is refused, and the error
        quotes no part that could be a secret."""
        for url in (f"https://a:{SECRET}@hs", f"https://hs?a={SECRET}", "https://h s"):
            error = self.assertRaises(OptionError, load_config, [], {}, url)
            self.assertNotIn(SECRET, str(error))
        for url in ("http://[::1]:8008", "https://hs.example/below/", "http://hs_1"):
            config = load_config([], {}, url)
            self.assertEqual(config.homeserver.url, url.rstrip("/"))

    def test_an_unreadable_file_is_named(self) -> None:
        """The error of an unreadable file names the file and the line, and quotes no
        content."""
        for content in (f"password: *{SECRET}", f"a: b: {SECRET}", "\x00", "a: ]"):
            path = self.file(content)
            error = self.assertRaises(OptionError, load_config, [path], {}, URL)
            self.assertIn(str(path), str(error))
            self.assertNotIn(SECRET, str(error))
            self.assertNotIn("\n", str(error))
        missing = self.directory / "missing.yaml"
        error = self.assertRaises(OptionError, load_config, [missing], {}, URL)
        self.assertIn(f"{missing}: can't be read: No such file", str(error))

    def test_an_empty_file_changes_no_default(self) -> None:
        """A file that is empty or holds only comments changes no default."""
        self.assertEqual(load_config([self.file("# no\n")], {}, URL), DEFAULTS)

    def test_the_homeserver_section_is_loaded_alone(self) -> None:
        """`load_homeserver` requires no other section, but an address."""
        path = self.file("homeserver: {url: 'http://a.example/', timeout_seconds: 3}")
        found = load_homeserver([path], {})
        self.assertEqual(
            found, HomeserverOptions("http://a.example", timeout_seconds=3)
        )
        found = load_homeserver([path], {"ROOMKEYS_HOMESERVER_URL": "http://b.example"})
        self.assertEqual(found.url, "http://b.example")
        error = self.assertRaises(OptionError, load_homeserver, [], {})
        self.assertEqual(error.option, "homeserver.url")

    def test_the_database_section_is_loaded_alone(self) -> None:
        """`load_database` requires no homeserver, but requires a name, because the
        default depends on the working directory."""
        path = self.file("database: {args: {database: a.db}}")
        found = load_database([path], {})
        self.assertEqual(found, DatabaseConfig("sqlite3", {"database": "a.db"}))
        error = self.assertRaises(OptionError, load_database, [], {})
        self.assertEqual(error.option, "database.args")
