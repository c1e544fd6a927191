"""Readers of the user's data, one kind of source a file."""
