"""Fused kernels for CPUs, written in Python and compiled by Numba on first use; no compiler is needed."""
