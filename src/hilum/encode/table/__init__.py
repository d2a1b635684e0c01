"""Any scans → one feature table on disk: where they come from, rows, side files, resuming, other forms."""
