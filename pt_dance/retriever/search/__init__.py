"""Exact search over vectors in memory, on disk or on a GPU."""
