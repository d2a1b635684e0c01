"""One page about results; published numbers beside ours."""
