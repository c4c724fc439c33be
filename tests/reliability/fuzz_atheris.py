"""Coverage-guided fuzzing of the parser with atheris. Arguments: RUNS CORPUS.

The process exits with a code other than 0 if an input breaks an assertion of the
oracle.
"""

from __future__ import annotations

import sys
from pathlib import Path
from random import Random

import atheris

with atheris.instrument_imports(include=["synapse_roomkeys.wire", "json"]):
    from synapse_roomkeys import wire

from synapse_roomkeys.errors import RoomKeysError
from synapse_roomkeys.types import Limits

from .inputs import Inputs
from .oracle import check_accepted, check_refusal

LIMITS = Limits()
SCOPES: tuple[tuple[str | None, str | None], ...] = (
    (None, None),
    ("!r:h", None),
    ("!r:h", "s"),
)
#: Number of seeds; for each seed, the corpus starts with one body per scope.
SEEDS = 200


def try_body(data: bytes) -> None:
    """Parse one body as an upload and as version info; the first byte selects the
    scope."""
    scope = SCOPES[data[0] % len(SCOPES)] if data else SCOPES[0]
    body = data[1:]
    try:
        keys = wire.parse_upload(body, scope[0], scope[1], LIMITS)
        check_accepted(keys, body, *scope)
    except RoomKeysError as error:
        check_refusal(error)
    for parse in (wire.parse_new_version, wire.parse_version_info):
        try:
            parse(body, LIMITS)
        except RoomKeysError as error:
            check_refusal(error)


def main(runs: str, corpus: str) -> None:
    """Fill the corpus with valid and almost valid bodies, and start the fuzzer."""
    for seed in range(SEEDS):
        for number, scope in enumerate(SCOPES):
            body = Inputs(Random(seed)).upload(*scope)
            (Path(corpus) / f"{seed}-{number}").write_bytes(bytes([number]) + body)
    atheris.Setup([sys.argv[0], f"-runs={runs}", "-max_len=4096", corpus], try_body)
    atheris.Fuzz()


if __name__ == "__main__":
    main(*sys.argv[1:])
