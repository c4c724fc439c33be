"""Measurements by name ("rows"), in the order of a run."""

from collections.abc import Callable
from types import MappingProxyType

from ..results import Results
from ..testbed import Testbed
from . import (
    costs,
    deletion,
    downloads,
    many_users,
    million,
    restore,
    statements,
    uploads,
)

Row = Callable[[Testbed, Results], None]

ON_POSTGRES: MappingProxyType[str, Row] = MappingProxyType(
    {
        "batches": uploads.batches,
        "sizes": uploads.sizes,
        "unvacuumed": uploads.unvacuumed,
        "merges": uploads.merges,
        "whole": downloads.whole_backup,
        "reads": downloads.reads,
        "restore": restore.restore,
        "users": many_users.concurrent_uploads,
        "delete": deletion.delete,
        "statements": statements.statements,
        "costs": costs.costs,
        "million": million.million,
        "crowd": many_users.large_table,
    }
)
ON_SQLITE: MappingProxyType[str, Row] = MappingProxyType(
    {
        "batches": uploads.batches,
        "sizes": uploads.sizes,
        "merges": uploads.merges,
        "whole": downloads.whole_backup,
        "reads": downloads.reads,
        "delete": deletion.delete,
    }
)
SQLITE = "sqlite"
NAMES = (*ON_POSTGRES, SQLITE)

__all__ = ["NAMES", "ON_POSTGRES", "ON_SQLITE", "SQLITE", "Row"]
