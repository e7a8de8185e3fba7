"""What the kernels of all variants are printed with: values as tensors, owed rows, products of matrices, shadows.

Goes in: a `Plan`, steps of its `Schedule`. Comes out: lines of a kernel. Start with values.py, then rows.py.
Knows nothing of programs that share memory, launches or variants; never imports the modules of triton above it.
"""
