"""Tests of the test tools: the history checker and the search for secrets."""
