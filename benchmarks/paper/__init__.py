"""The experiments of the method's papers on data at hand: ``python -m benchmarks.paper.run``."""
