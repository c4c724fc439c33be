"""The transactions on the backups of all users."""

from collections.abc import Callable

from ..storage import EndToEndRoomKeyStore, Engine, Erasure, Overview, Tasks
from ..storage.transactions import Transactions
from .removal import Removal


class Backend:
    """The transactions that the HTTP interface for operators needs.

    Attributes:
        store: the backups of users.
        overview: queries over all users.
        erasure: deletions that no client can ask for.
        removal: deletions of versions and users.
        tasks: the tasks of the interface.
    """

    def __init__(
        self,
        database: Transactions,
        engine: Engine,
        store: EndToEndRoomKeyStore,
        now: Callable[[], float],
    ) -> None:
        """
        Args:
            now: returns the Unix time in seconds.
        """
        self.store = store
        self.overview = Overview(database, engine)
        self.erasure = Erasure(database, engine)
        self.removal = Removal(database, engine, store, now)
        self.tasks = Tasks(database, now)
