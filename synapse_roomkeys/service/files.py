"""The limit of open files, and the number of connections that the limit allows."""

import logging
import resource

logger = logging.getLogger(__name__)

#: Files for the standard streams, the reactor, the listeners, and modules and
#: certificates while they are read. An idle service on SQLite has 14 files open.
_OWN = 32
#: Files for each connection to the database: SQLite has the file, -wal and -shm.
_PER_DATABASE_CONNECTION = 3


def raise_file_limit() -> int:
    """Raise the soft limit of open files to the hard limit.

    Returns:
        The limit in force: the soft limit of before if the system forbids raising it,
        as a system call filter does.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == hard:
        return soft
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    except (OSError, ValueError) as error:
        logger.warning(
            "The limit of open files stays at %d and isn't raised to %d: %s",
            soft,
            hard,
            error,
        )
        return soft
    return hard


def max_client_connections(
    files: int, *, database_connections: int, other_connections: int
) -> int:
    """Return the number of clients that may be connected: two files for each, one for
    the connection and one for the body of a request.

    Args:
        files: the limit of open files.
        database_connections: the size of the pool.
        other_connections: the connections to the homeserver and of monitoring.

    Returns:
        The number; 0 or less if the service's own files leave no room.
    """
    database = _PER_DATABASE_CONNECTION * database_connections
    return (files - _OWN - database - other_connections) // 2
