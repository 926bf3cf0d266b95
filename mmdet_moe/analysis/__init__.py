"""Looking at trained models: the results of runs, and figures."""
