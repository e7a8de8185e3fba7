"""C++ kernels of a plan, compiled once and kept on disk by content.

Goes in: a `Plan`. Comes out: the text of a boxed op (cpp.py), and the op, registered (build.py).
Start with cpp.py; the headers hold what is the same for every plan. Never imports triton.
"""
