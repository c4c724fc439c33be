"""Unit tests: everything in memory, without sockets; trial runs them."""
