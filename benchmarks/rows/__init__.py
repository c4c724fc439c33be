"""What is measured, by name; the order is that of a run."""

from collections.abc import Callable
from types import MappingProxyType

from ..results import Results
from ..stage import Stage
from . import (
    costs,
    crowd,
    deletion,
    downloads,
    million,
    restore,
    statements,
    uploads,
)

Row = Callable[[Stage, Results], None]

ON_POSTGRES: MappingProxyType[str, Row] = MappingProxyType(
    {
        "batches": uploads.batches,
        "sizes": uploads.sizes,
        "unvacuumed": uploads.just_stored,
        "merges": uploads.merges,
        "whole": downloads.whole,
        "reads": downloads.reads,
        "restore": restore.restore,
        "users": crowd.users,
        "delete": deletion.delete,
        "statements": statements.statements,
        "costs": costs.costs,
        "million": million.million,
        "crowd": crowd.crowd,
    }
)
ON_SQLITE: MappingProxyType[str, Row] = MappingProxyType(
    {
        "batches": uploads.batches,
        "sizes": uploads.sizes,
        "merges": uploads.merges,
        "whole": downloads.whole,
        "reads": downloads.reads,
        "delete": deletion.delete,
    }
)
SQLITE = "sqlite"
NAMES = (*ON_POSTGRES, SQLITE)

__all__ = ["NAMES", "ON_POSTGRES", "ON_SQLITE", "SQLITE", "Row"]
