"""The limit of open files, and how many connections it has room for."""

import logging
import resource

logger = logging.getLogger(__name__)

#: Files that are no connection of a client: the standard streams, the reactor's own,
#: the listeners, a module or certificate that is read. A running service has 14.
_OWN = 32
#: Files for each connection to the database: SQLite has the file, -wal and -shm.
_PER_DATABASE_CONNECTION = 3


def raise_file_limit() -> int:
    """Raise the limit of open files as far as this process may.

    Returns:
        The limit in force. Under a system call filter that forbids raising it, that is
        the one that the process was started with.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == hard:
        return soft
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    except (OSError, ValueError) as error:
        logger.warning(
            "The limit of open files stays at %d and isn't raised to %d: %s",
            *(soft, hard, error),
        )
        return soft
    return hard


def room_for_connections(
    files: int, *, database_connections: int, other_connections: int
) -> int:
    """How many clients may be connected. Each may have a file for its body as well.

    Args:
        files: how many files may be open.
        database_connections: how many there may be to the database.
        other_connections: all others that are never refused.

    Returns:
        The number; not above 0 if there is no room for what the service itself needs.
    """
    database = _PER_DATABASE_CONNECTION * database_connections
    return (files - _OWN - database - other_connections) // 2
