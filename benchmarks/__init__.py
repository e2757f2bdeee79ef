"""Benchmarks: one script a question. Compare ratios within one run; machines are shared."""
