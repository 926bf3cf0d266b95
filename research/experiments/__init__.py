"""The experiments behind docs/results.md, which ``tools/reproduce.py`` runs."""
