"""Triton kernels, one file per operator beside its plain PyTorch definition. Only `ops/NAME.py` imports them, when a call can use them:
an installation without a CUDA device need not have Triton."""
