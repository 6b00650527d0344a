"""Benchmarks of balanced_optim: measured on real data, against plain baselines."""
