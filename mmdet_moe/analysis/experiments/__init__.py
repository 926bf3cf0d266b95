<<<<<<< HEAD
"""The experiments of docs/results.md: what they train, and the tables and figures they make."""
=======
"""The experiments behind docs/results.md, which ``tools/reproduce.py`` runs."""
>>>>>>> main
