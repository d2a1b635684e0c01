"""The benchmark: tasks, encoders and heads brought together, scored with intervals that hold, and told on one page."""
