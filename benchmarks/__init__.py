"""Benchmarks, one script per question. Compare ratios within one run: machines are shared."""
