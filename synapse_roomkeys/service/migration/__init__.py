"""The command ``migrate``: backups copied from one database into another."""

from .decisions import Keep
from .dendrite_config import load_dendrite_database
from .layouts import DENDRITE, SYNAPSE
from .report import Progress, Result
from .run import Options, migrate
from .side import MigrateError
from .synapse_config import load_synapse_database, synapse_database

__all__ = [
    "DENDRITE",
    "SYNAPSE",
    "Keep",
    "MigrateError",
    "Options",
    "Progress",
    "Result",
    "load_dendrite_database",
    "load_synapse_database",
    "migrate",
    "synapse_database",
]
