"""What the voxels of a scan say: whether they are sound, what they show, and what they would give away."""
