"""Benchmark of the module against Synapse's built-in endpoints and a physical limit."""
