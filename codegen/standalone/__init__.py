"""One file that holds the step of a plan, all it needs and its own check.

Goes in: a `Plan`. Comes out: Python text that runs without this package, and Triton kernels compiled ahead of time.
Start with standalone.py. Imports both targets.
"""
