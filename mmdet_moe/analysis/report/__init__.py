"""What a user looks at: figures, tables, sentences, and the explorer. All read ``experts.json``."""
