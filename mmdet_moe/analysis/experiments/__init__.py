"""The experiments of docs/results.md: what they train, and the tables and figures they make."""
