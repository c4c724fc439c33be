"""Tests of the module's options."""

from twisted.trial.unittest import SynchronousTestCase

from synapse_roomkeys.config import ModuleConfig, OptionError, parse_module_config
from synapse_roomkeys.types import Limits, Retention


class ParseModuleConfigTests(SynchronousTestCase):
    """Tests of `parse_module_config`."""

    def test_every_option_has_a_default(self) -> None:
        """An empty configuration is valid, because every option has a default."""
        self.assertEqual(parse_module_config({}), ModuleConfig())

    def test_every_option_is_parsed(self) -> None:
        """Each option sets its own field of `ModuleConfig`."""
        config = parse_module_config(
            {
                "stalled_download_seconds": 1,
                "max_body_bytes": 2,
                "max_session_data_bytes": 3,
                "max_waiting_requests": 4,
                "keep_keys_on_room_purge": True,
                "record_days": 0,
                "keep_replaced": "all",
                "replaced_keys_days": 6,
                "deleted_versions_days": 7,
                "admin_api": True,
            }
        )
        retention = Retention(0, "all", 6, 7)
        limits = Limits(2, 3, 4)
        self.assertEqual(config, ModuleConfig(1, True, limits, retention, True))

    def test_an_unknown_option_is_named(self) -> None:
        """An unknown option is an error that names the option and the similar known
        option."""
        error = self.assertRaises(OptionError, parse_module_config, {"max_bytes": 1})
        self.assertEqual(error.option, "max_bytes")
        self.assertIn("max_bytes", str(error))
        self.assertIn("max_body_bytes", str(error))

    def test_a_wrong_value_is_named(self) -> None:
        """A value other than a positive integer, such as true, is an error that names
        the option."""
        values: list[object] = [0, -1, 1.5, True, None, "1", [], [5]]
        for value in values:
            for option in ("max_body_bytes", "max_user_keys"):
                error = self.assertRaises(
                    OptionError, parse_module_config, {option: value}
                )
                self.assertEqual(error.option, option)

    def test_a_wrong_value_of_retention_is_named(self) -> None:
        """Days are integers from 0 on, and kept keys have three choices."""
        wrong: dict[str, list[object]] = {
            "record_days": [-1, 1.5, True, None, 100_001],
            "keep_replaced": ["lossless", None, True],
            "keep_keys_on_room_purge": [0, "yes", None],
        }
        for option, values in wrong.items():
            for value in values:
                error = self.assertRaises(
                    OptionError, parse_module_config, {option: value}
                )
                self.assertEqual(error.option, option)

    def test_off_needs_no_quotes(self) -> None:
        """YAML reads off as false, which is the same for a choice with "off"."""
        config = parse_module_config({"keep_replaced": False})
        self.assertEqual(config.retention.keep_replaced, "off")

    def test_a_list_or_a_text_is_refused(self) -> None:
        """A configuration that is not a mapping is refused."""
        for options in (["max_body_bytes"], "max_body_bytes"):
            self.assertRaises(OptionError, parse_module_config, options)
