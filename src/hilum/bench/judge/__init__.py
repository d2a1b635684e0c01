"""Predictions → scores with intervals, and one model against another."""
