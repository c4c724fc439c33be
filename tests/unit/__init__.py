"""Tests without a socket, a thread or a file; trial and pytest run them alike."""
