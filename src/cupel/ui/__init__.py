"""The run folders in a browser."""
