"""Triton kernels of a plan, and how they are launched.

Goes in: a `Plan`. Comes out: the text of a module (triton.py), the module (load.py), its fastest launch (tune.py).
Start with triton.py, then kernel.py. Never imports cpp.
"""
