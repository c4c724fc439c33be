"""The text format of PostgreSQL's COPY."""

from collections.abc import Sequence
from typing import Any

from .values import Row


def copy_text(prefix: Sequence[Any], rows: Sequence[Row]) -> str:
    """Write rows in the text format of PostgreSQL's COPY.

    Args:
        prefix: the values of the first columns, the same in each row.
        rows: the values of the other columns.

    Returns:
        A line for each row, with a newline at the end.
    """
    start = "".join(f"{_escape(value)}\t" for value in prefix)
    lines = (start + "\t".join(map(_escape, row)) for row in rows)
    return "\n".join(lines) + "\n"


def _escape(value: Any) -> str:
    """Write a value; None is NULL."""
    if value is None:
        return "\\N"
    text = str(value).replace("\\", "\\\\").replace("\t", "\\t")
    return text.replace("\n", "\\n").replace("\r", "\\r")
