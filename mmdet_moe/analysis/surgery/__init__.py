"""Tools that make another model of a trained one: each writes a checkpoint and its config."""
