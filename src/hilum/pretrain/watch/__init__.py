"""Is the run learning? Signals, verdicts, and how they are shown."""
