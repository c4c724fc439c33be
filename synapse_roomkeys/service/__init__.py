"""The host of its own: a service beside any homeserver, behind its reverse proxy."""
