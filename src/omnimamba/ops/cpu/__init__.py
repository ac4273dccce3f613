"""Fused kernels for CPUs, written in Python and compiled by Numba on first use; no compiler is needed."""

LANES = 16
"""fp32 numbers in a vector. Kept here, where whoever asks about sizes need not load Numba."""
