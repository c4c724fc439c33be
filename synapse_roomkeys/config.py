"""The options of an operator's configuration."""

from collections.abc import Iterable, Mapping
from typing import Any

import attrs

from .types import Limits


class OptionError(Exception):
    """An option is unknown, or has a value that it can't have.

    Attributes:
        option: its name.
    """

    def __init__(self, option: str, msg: str) -> None:
        super().__init__(f"{option}: {msg}")
        self.option = option


@attrs.frozen
class ModuleConfig:
    """The ``config:`` of the module in homeserver.yaml.

    Attributes:
        stalled_download_seconds: for how long a client may read nothing before its
            download is dropped, counted from the last byte that it took.
        limits: what is refused for its size.
    """

    stalled_download_seconds: int = 300
    limits: Limits = attrs.field(factory=Limits)


#: The names of the options that `Limits` has.
LIMITS = tuple(field.name for field in attrs.fields(Limits))
_OPTIONS = ("stalled_download_seconds", *LIMITS)


def unknown_option(option: str, known: Iterable[str]) -> OptionError:
    """The error for an option that nobody knows, which names those that are."""
    return OptionError(option, f"unknown option; known are {', '.join(known)}")


def positive_integer(option: str, value: Any) -> int:
    """The value of an option, which is a number of things.

    Raises:
        OptionError: it isn't a positive integer.
    """
    if type(value) is not int or value < 1:
        raise OptionError(option, "must be a positive integer")
    return value


def parse_module_config(config: Any) -> ModuleConfig:
    """Check an operator's options; those that aren't there keep their defaults.

    Raises:
        OptionError: one of them is unknown, or isn't a positive integer.
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
