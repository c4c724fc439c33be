"""The tests: `unit` in memory, `integration` with real servers."""
