"""Code generation: Program and Plan -> source text -> callable.

schedule.py the order of a token's work, calls.py the pointwise vocabulary, cut.py what has no spelling there, source.py
the line builder; cpp/ and triton/ the targets, standalone/ files that need nothing of ours.
Start with schedule.py. Never imports passes or what runs steps.
"""
