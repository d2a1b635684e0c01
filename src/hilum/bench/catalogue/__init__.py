"""The tasks and data sets that papers publish, as plain data."""
