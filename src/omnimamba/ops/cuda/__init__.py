"""Kernels in CUDA C++, compiled at run time by NVRTC, which comes with torch's CUDA wheels: no compiler is needed."""
