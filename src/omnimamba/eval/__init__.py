"""Benchmarks: each reads its published files from a folder and gives figures with intervals and the protocol they were taken by."""
