"""The service: a process beside any homeserver, behind the same reverse proxy."""
