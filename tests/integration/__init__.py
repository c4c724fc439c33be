"""Tests with real databases, real sockets and real homeservers; pytest runs them."""
