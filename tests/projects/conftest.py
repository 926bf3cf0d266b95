from toy_runs import dense_model, make_runner, toy_model  # noqa: F401
