"""Single images: what a model finds in them, and which expert found it."""
