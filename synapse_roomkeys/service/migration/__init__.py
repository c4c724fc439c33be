"""The command ``migrate``: backups copied from one database into another."""

from .report import Progress, Result
from .run import MigrateError, migrate, synapse_database

__all__ = ["MigrateError", "Progress", "Result", "migrate", "synapse_database"]
