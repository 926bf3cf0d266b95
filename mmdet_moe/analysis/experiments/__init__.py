"""The experiments behind docs/results.md: what they train, and the tables and figures they make.

``tools/reproduce.py`` runs them.
"""
