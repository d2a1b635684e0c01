"""Light heads on frozen features, and the evaluation that keeps patients apart. Nothing here imports torch."""
