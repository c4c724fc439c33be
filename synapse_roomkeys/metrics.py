"""What is counted, in Prometheus' default registry, which Synapse serves already."""

import math
import platform
from functools import lru_cache
from typing import TypeVar

from prometheus_client import Counter, Gauge, Histogram, Info

M = TypeVar("M", Counter, Gauge, Histogram)


@lru_cache(maxsize=4096)
def series(metric: M, *labels: str) -> M:
    """The series of a metric that has these label values, in the metric's order.

    `labels` takes 3 microseconds under a lock at each call; requests need five.
    """
    return metric.labels(*labels)


#: Keys of uploads, by what became of them: stored, replaced or kept (the stored one).
uploaded_keys = Counter(
    "synapse_roomkeys_uploaded_keys", "Keys uploaded, by outcome", ["outcome"]
)
#: Requests that were refused, by Matrix error code.
refused_requests = Counter(
    "synapse_roomkeys_refused_requests", "Requests refused, by errcode", ["errcode"]
)
#: Bytes of key downloads, as handed to the connection.
download_bytes = Counter(
    "synapse_roomkeys_download_bytes", "Bytes of downloads of keys"
)
#: Downloads that were broken off after their first byte.
broken_downloads = Counter(
    "synapse_roomkeys_broken_downloads", "Downloads broken off", ["reason"]
)
#: Stored keys that were left out of an answer because session_data isn't JSON.
broken_rows = Counter(
    "synapse_roomkeys_broken_rows", "Stored keys left out, as they aren't JSON"
)
#: Access tokens looked up, by outcome. The homeserver answered, refused the token,
#: failed, or throttled (429); or the answer to another request was used (cached).
whoami_requests = Counter(
    "synapse_roomkeys_whoami_requests", "Access tokens looked up", ["outcome"]
)
#: Requests that wait for other requests of their user, and downloads that wait for a
#: permit (`fairness.FairSemaphore`).
waiting_requests = Gauge(
    "synapse_roomkeys_waiting_requests", "Requests that wait for their turn"
)
#: Tries of transactions that failed and were followed by another, by cause: see
#: `synapse_roomkeys.storage.database.CAUSES`.
transaction_retries = Counter(
    "synapse_roomkeys_transaction_retries", "Transactions tried again", ["cause"]
)
#: Transactions that were given up, by cause: their requests were answered 503.
transaction_failures = Counter(
    "synapse_roomkeys_transaction_failures", "Transactions given up", ["cause"]
)
#: When the last request to write was committed, in Unix seconds; 0 before the first.
last_write = Gauge(
    "synapse_roomkeys_last_write_timestamp_seconds", "Time of the last write"
)
#: The plugin's version, Python's, and the database engine.
build = Info("synapse_roomkeys_build", "Versions of the plugin and of Python")

# What follows stays empty in a host that has measures of its own for it.

#: Requests that were answered, by servlet ("none" for an unknown path), by method, and
#: by status ("dropped" where the connection was lost first).
requests = Counter(
    "synapse_roomkeys_requests", "Requests answered", ["servlet", "method", "status"]
)
#: How long they took, from their last byte to that of the answer. Most take some
#: milliseconds; a download takes as long as its client does.
request_seconds = Histogram(
    "synapse_roomkeys_request_seconds",
    "Seconds to answer requests",
    ["servlet", "method"],
    buckets=(0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60),
)
#: Requests that are being answered.
requests_in_flight = Gauge(
    "synapse_roomkeys_requests_in_flight", "Requests being answered", ["method"]
)
#: Connections to the listeners that clients use: how many are open, and how many may be
#: before further ones are refused, as the limit of open files has it.
connections = Gauge("synapse_roomkeys_connections", "Open connections of clients")
max_connections = Gauge(
    "synapse_roomkeys_max_connections", "Connections of clients that there may be"
)
#: Connections over that number: answered 503, unless they asked for the status, or
#: closed.
refused_connections = Counter(
    "synapse_roomkeys_refused_connections", "Connections that were one too many"
)
#: Transactions of the connection pool, by state: those that have a connection
#: (in_use), and those that wait for one (waiting).
pool_transactions = Gauge(
    "synapse_roomkeys_pool_transactions", "Transactions in the pool", ["state"]
)
#: How long transactions took, from when they had a connection, by their names.
transaction_seconds = Histogram(
    "synapse_roomkeys_transaction_seconds",
    "Seconds of transactions",
    ["transaction"],
    buckets=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10),
)
#: About how many keys there are in all backups, as measured within the last minutes;
#: NaN before that.
stored_keys = Gauge("synapse_roomkeys_stored_keys", "Keys in all backups")
stored_keys.set(math.nan)


def note_build(version: str, database: str) -> None:
    """Tell the versions of the process.

    Args:
        version: the plugin's.
        database: the name of the database engine.
    """
    python = platform.python_version()
    build.info({"version": version, "python": python, "database": database})
