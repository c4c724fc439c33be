"""Tests: `unit` in memory, `integration` and `reliability` with real servers,
`contract` for the scenarios that all of them share."""
