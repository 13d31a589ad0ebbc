"""Measurements of time, memory, coverage and storage: one script each."""
