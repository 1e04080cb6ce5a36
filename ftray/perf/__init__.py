"""Benchmarks, and the tables they print."""
