"""Kernels in Triton, which may be missing: `models` imports none of them before one runs."""
