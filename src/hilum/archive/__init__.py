"""The archive room: from scans on disk to a clean, private store. Nothing here imports torch."""
