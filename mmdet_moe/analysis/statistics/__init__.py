"""What is computed from the records: associations, metrics, outcomes, and ``experts.json``."""
