"""The encoder room: one transformer, the contract a model makes about its input, and features of any scan."""
