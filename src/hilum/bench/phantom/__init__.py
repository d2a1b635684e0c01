"""The phantom benchmark: its scans and its tasks."""
