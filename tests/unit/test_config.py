"""The operator's options."""

from twisted.trial.unittest import SynchronousTestCase

from synapse_roomkeys.config import ModuleConfig, OptionError, parse_module_config
from synapse_roomkeys.types import Limits


class ParseModuleConfigTests(SynchronousTestCase):
    """`parse_module_config`."""

    def test_nothing_is_needed(self) -> None:
        """Every option has a default."""
        self.assertEqual(parse_module_config({}), ModuleConfig())

    def test_all_options(self) -> None:
        """Each option ends up where it belongs."""
        config = parse_module_config(
            {
                "stalled_download_seconds": 1,
                "max_body_bytes": 2,
                "max_session_data_bytes": 3,
                "max_waiting_requests": 4,
            }
        )
        self.assertEqual(config, ModuleConfig(1, Limits(2, 3, 4)))

    def test_an_unknown_option_is_named(self) -> None:
        """A typing error is not passed over."""
        error = self.assertRaises(OptionError, parse_module_config, {"max_bytes": 1})
        self.assertEqual(error.option, "max_bytes")
        self.assertIn("max_bytes", str(error))
        self.assertIn("max_body_bytes", str(error))

    def test_a_wrong_value_is_named(self) -> None:
        """A number must be a positive integer, and true is none."""
        values: list[object] = [0, -1, 1.5, True, None, "1", []]
        for value in values:
            error = self.assertRaises(
                OptionError, parse_module_config, {"max_body_bytes": value}
            )
            self.assertIn("max_body_bytes", str(error))

    def test_a_list_is_no_config(self) -> None:
        """What isn't a mapping is refused."""
        self.assertRaises(OptionError, parse_module_config, ["max_body_bytes"])
