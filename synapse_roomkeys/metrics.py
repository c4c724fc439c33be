"""What is counted, in Prometheus' default registry, which Synapse serves already."""

from prometheus_client import Counter

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
