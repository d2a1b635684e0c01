"""What the field has released: which encoders there are, fetched, read as ours, checked, and written for others."""
