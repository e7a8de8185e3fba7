"""C++ kernels of a plan, as text.

Goes in: a `Plan`. Comes out: the text of a boxed op, which build.py compiles, keeps and loads.
Start with cpp.py; the headers hold what is the same for every plan. Never imports triton.
"""

from kvbuffer_compile.codegen.cpp.cpp import emit

__all__ = ["emit"]
