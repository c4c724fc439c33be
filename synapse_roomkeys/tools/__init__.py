"""The operator's commands on a database of backups, whether or not a server runs."""
