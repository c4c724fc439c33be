"""Options that both hosts have, and the options of the Synapse module."""

from collections.abc import Iterable, Mapping
from typing import Any

import attrs

from .types import Limits, Retention


class OptionError(Exception):
    """An option is unknown, or has a wrong value. The text names the option.

    Attributes:
        option: name of the option.
    """

    def __init__(self, option: str, msg: str) -> None:
        super().__init__(f"{option}: {msg}")
        self.option = option


@attrs.frozen
class ModuleConfig:
    """The section ``config:`` of the module in homeserver.yaml.

    Attributes:
        stalled_download_seconds: time for which a client may read nothing before its
            download is dropped, counted from the last byte that it took.
        limits: sizes and numbers above which a request is refused.
        retention: what is kept of changed and deleted backups.
    """

    stalled_download_seconds: int = 300
    limits: Limits = attrs.field(factory=Limits)
    retention: Retention = attrs.field(factory=Retention)


#: Names of the options in `Limits`.
LIMITS = tuple(field.name for field in attrs.fields(Limits))
_OPTIONS = ("stalled_download_seconds", *LIMITS)


def unknown_option(option: str, known: Iterable[str]) -> OptionError:
    """Return the error for an unknown option. The text lists the known options."""
    return OptionError(option, f"unknown option; known are {', '.join(known)}")


def positive_integer(option: str, value: Any) -> int:
    """Return the value of an option if the value is a positive integer.

    Raises:
        OptionError: the value isn't a positive integer.
    """
    if type(value) is not int or value < 1:
        raise OptionError(option, "must be a positive integer")
    return value


def parse_module_config(config: Any) -> ModuleConfig:
    """Check the module's options. Options that aren't set have their defaults.

    Raises:
        OptionError: an option is unknown, or isn't a positive integer.
    """
    if not isinstance(config, Mapping):
        raise OptionError("config", "must be a mapping of options to values")
    for option, value in config.items():
        if option not in _OPTIONS:
            raise unknown_option(str(option), _OPTIONS)
        positive_integer(option, value)
    limits = {name: config[name] for name in LIMITS if name in config}
    rest = {name: value for name, value in config.items() if name not in limits}
    return ModuleConfig(limits=Limits(**limits), **rest)
