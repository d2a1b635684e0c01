"""Pages about one scan (`inspect`) and about a whole archive (`overview`)."""
