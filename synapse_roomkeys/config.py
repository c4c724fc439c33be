"""Options as typed fields of attrs classes, and the options of the Synapse module.

A field is an option if its type is a `Literal`, or has a `msgspec.Meta` with bounds and
a description of the values. A field whose type is itself an attrs class is a section,
whose options have the section's name and a dot before theirs.
"""

from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal, get_args, get_origin

import attrs
import msgspec

from .types import Boolean, Limits, PositiveInt, Retention


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
        keep_keys_on_room_purge: Whether Synapse keeps the backed up keys of a room that
            it purges.
        limits: sizes and numbers above which a request is refused.
        retention: what is kept of changed and deleted backups.
        admin_api: Whether the HTTP interface for operators is served.
    """

    stalled_download_seconds: PositiveInt = 300
    keep_keys_on_room_purge: Boolean = False
    limits: Limits = attrs.field(factory=Limits)
    retention: Retention = attrs.field(factory=Retention)
    admin_api: Boolean = False


def parse_module_config(config: Any) -> ModuleConfig:
    """Check the module's options, whose names have no section before them. Options that
    aren't set have their defaults.

    Raises:
        OptionError: an option is unknown, or has a wrong value.
    """
    if not isinstance(config, Mapping):
        raise OptionError("config", "must be a mapping of options to values")
    types = options_of(ModuleConfig)
    names = {name.rpartition(".")[2]: name for name in types}
    known = {option: types[name] for option, name in names.items()}
    values = {
        option: check_option(option, value, known) for option, value in config.items()
    }
    parsed: ModuleConfig = make_section(
        ModuleConfig, {names[option]: value for option, value in values.items()}
    )
    return parsed


def options_of(section: Any, prefix: str = "") -> dict[str, Any]:
    """Return the types of a section's options by the options' names, with the options
    of nested sections.

    Args:
        section: the attrs class.
        prefix: start of the names.
    """
    types: dict[str, Any] = {}
    for field in attrs.fields(section):
        name = prefix + field.name
        if attrs.has(field.type):
            types |= options_of(field.type, f"{name}.")
        elif _describe(field.type) is not None:
            types[name] = field.type
    return types


def make_section(section: Any, values: Mapping[str, Any], prefix: str = "") -> Any:
    """Return an instance of a section. Options without a value have their defaults.

    Args:
        section: the attrs class.
        values: checked values by the options' names. A nested section may be among
            them as a whole.
        prefix: start of the names of the section's options.
    """
    arguments = {}
    for field in attrs.fields(section):
        name = prefix + field.name
        if name in values:
            arguments[field.name] = values[name]
        elif attrs.has(field.type):
            arguments[field.name] = make_section(field.type, values, f"{name}.")
    return section(**arguments)


def check_option(
    name: str,
    value: Any,
    known: Mapping[str, Any],
    dec_hook: Callable[[Any, Any], Any] | None = None,
) -> Any:
    """Return the value of an option in the option's type.

    Args:
        known: the types of the known options, by name.
        dec_hook: converts a value to a type that msgspec doesn't support.

    Raises:
        OptionError: the option is unknown, or the value is wrong. The text leaves the
            value out, unless a `ValueError` of `dec_hook` quotes it.
    """
    if name not in known:
        msg = f"unknown option; known are {', '.join(known)}"
        raise OptionError(str(name), msg)
    if value is False and "off" in get_args(known[name]):
        # YAML reads an unquoted off as false.
        value = "off"
    expected = f"must be {_describe(known[name])}"
    try:
        checked = msgspec.convert(value, known[name], dec_hook=dec_hook)
    except msgspec.ValidationError as error:
        raise OptionError(name, str(error.__cause__ or expected)) from None
    # In YAML an option without a value is null. The value may have been forgotten, so
    # null isn't taken for "no limit".
    if checked is None:
        raise OptionError(name, expected)
    return checked


def _describe(expected: Any) -> str | None:
    """Describe the values of a type: the choices of a `Literal`, or the description in
    the `msgspec.Meta` of the type or of a part of a union. Other types have none."""
    if get_origin(expected) is Literal:
        return f"one of {', '.join(get_args(expected))}"
    for part in (expected, *get_args(expected)):
        if get_origin(part) is Annotated:
            return str(part.__metadata__[0].description)
    return None
