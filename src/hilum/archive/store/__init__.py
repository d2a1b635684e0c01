"""The store: `store` (write and read volumes), `verify`, `care` (merge, append, compact), `export`."""
