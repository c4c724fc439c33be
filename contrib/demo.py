"""Throwaway Synapse with the module, for a first try: ``python -m contrib.demo``."""

import signal
import threading

from tests.servers import Synapse, temporary_directory

COMMANDS = """\
# Synapse runs at {url}, with the user {user}.
# Paste these commands one by one. Create a backup and store its version in V:

V=$(curl -s -X POST -H 'Authorization: Bearer {token}' \\
  -d '{{"algorithm": "m.megolm_backup.v1.curve25519-aes-sha2",
       "auth_data": {{"public_key": "demo"}}}}' \\
  {api}/version | sed 's/.*"version": *"\\([^"]*\\)".*/\\1/'); echo "version $V"

# Upload a session's key:

curl -s -X PUT -H 'Authorization: Bearer {token}' \\
  -d '{{"first_message_index": 5, "forwarded_count": 0,
       "is_verified": false, "session_data": {{"ciphertext": "demo"}}}}' \\
  "{api}/keys/{room}/{session}?version=$V"; echo

# Upload a better key of the same session, with a lower first_message_index:

curl -s -X PUT -H 'Authorization: Bearer {token}' \\
  -d '{{"first_message_index": 0, "forwarded_count": 0,
       "is_verified": true, "session_data": {{"ciphertext": "better"}}}}' \\
  "{api}/keys/{room}/{session}?version=$V"; echo

# Download the key, which is the better one:

curl -s -H 'Authorization: Bearer {token}' \\
  "{api}/keys/{room}/{session}?version=$V"; echo

# Show the backup version, with its number of keys and its etag:

curl -s -H 'Authorization: Bearer {token}' {api}/version; echo

# Ctrl-C in this terminal stops Synapse and deletes all its files.
"""


def main() -> None:
    """Run Synapse and print commands to try, until SIGINT or SIGTERM."""
    stopped = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stopped.set())
    print("Starting Synapse, which takes some seconds...", flush=True)
    with temporary_directory("demo-") as directory, Synapse(directory) as synapse:
        user = synapse.register("alice")
        commands = COMMANDS.format(
            url=synapse.url,
            api=f"{synapse.url}/_matrix/client/v3/room_keys",
            token=user.access_token,
            user=user.user_id,
            room="%21room%3Atest.example",
            session="session",
        )
        print(f"\n{commands}", flush=True)
        stopped.wait()


if __name__ == "__main__":
    main()
