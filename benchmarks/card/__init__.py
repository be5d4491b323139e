"""All measurements on a GPU by one command, ``python -m benchmarks.card``."""
