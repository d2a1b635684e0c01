"""The pre-training room: Curia-2's recipe in 2D, from a store to an exported encoder."""
