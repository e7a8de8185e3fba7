"""Code generation: Program and Plan -> source text -> callable.

schedule.py the order of a token's work, calls.py the pointwise vocabulary, cut.py what has no spelling there, source.py
the line builder; cpp/ and triton/ the targets, build.py what compiles and loads C++, standalone/ files that run alone.
Start with schedule.py. Never imports passes or what runs steps.
"""
