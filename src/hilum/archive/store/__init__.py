"""The store: `store` (write and read volumes), `index`, `verify`, `care` (merge, append, compact), `export`."""
