"""Forwards from one state: which values are linear in it, which read it, and in which order.

Goes in: a candidate state. Comes out: versions and reads as a program's events, or the refusal of the state.
Start with walk.py. Imports reading and algebra.
"""
