"""Benchmarks: studies of quality and measurements of cost, each of which states the claim it tests. See README.md."""
