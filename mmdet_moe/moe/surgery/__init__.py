"""Surgery on models: what can become experts, and how wide they are."""
