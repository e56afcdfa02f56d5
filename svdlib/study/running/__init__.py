"""Running notebooks: their parameters, one run, many runs, the command line."""
