"""What `tools/benchmark.py` measures: one module a subcommand, on top of `timing`."""
