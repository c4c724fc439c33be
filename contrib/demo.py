"""A throwaway server to try the module on: ``python -m contrib.demo``."""

import signal
import threading

from tests.servers import Synapse, temporary_directory

LINES = """\
# A server runs at {url}, for {user}.
# Paste these one after the other. First create a backup, and keep its version:

V=$(curl -s -X POST -H 'Authorization: Bearer {token}' \\
  -d '{{"algorithm": "m.megolm_backup.v1.curve25519-aes-sha2",
       "auth_data": {{"public_key": "demo"}}}}' \\
  {api}/version | sed 's/.*"version": *"\\([^"]*\\)".*/\\1/'); echo "version $V"

# Upload the key of a session:

curl -s -X PUT -H 'Authorization: Bearer {token}' \\
  -d '{{"first_message_index": 5, "forwarded_count": 0,
       "is_verified": false, "session_data": {{"ciphertext": "demo"}}}}' \\
  "{api}/keys/{room}/{session}?version=$V"; echo

# Merge a better one, which reaches further back:

curl -s -X PUT -H 'Authorization: Bearer {token}' \\
  -d '{{"first_message_index": 0, "forwarded_count": 0,
       "is_verified": true, "session_data": {{"ciphertext": "better"}}}}' \\
  "{api}/keys/{room}/{session}?version=$V"; echo

# Download it:

curl -s -H 'Authorization: Bearer {token}' \\
  "{api}/keys/{room}/{session}?version=$V"; echo

# Show the backup, with the number of its keys and its etag:

curl -s -H 'Authorization: Bearer {token}' {api}/version; echo

# Ctrl-C here stops the server and leaves nothing behind.
"""


def main() -> None:
    """Run a server until interrupted or terminated."""
    stopped = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stopped.set())
    print("Starting Synapse, this takes some seconds...", flush=True)
    with temporary_directory("demo-") as directory, Synapse(directory) as synapse:
        user = synapse.register("alice")
        lines = LINES.format(
            url=synapse.url,
            api=f"{synapse.url}/_matrix/client/v3/room_keys",
            token=user.access_token,
            user=user.user_id,
            room="%21room%3Atest.example",
            session="session",
        )
        print(f"\n{lines}", flush=True)
        stopped.wait()


if __name__ == "__main__":
    main()
