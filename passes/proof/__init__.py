"""Proof of a lifted program on numbers, in float64, at compile time.

Goes in: the captured graph, its lifted copy, a program. Comes out: nothing, or the reason why it may not be used.
Start with validate.py. Imports reading and storage; never the lift, which it must not believe.
"""
