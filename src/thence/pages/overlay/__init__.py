"""The page of several runs, laid over each other."""
