"""Looking at trained models: results of runs, and (later) what the experts learned."""
