"""States that are part of a larger tensor: stacks of layers, pools of slots, what is donated and returned.

Goes in: a graph. Comes out: the graph with an input for each such state, and what puts them back.
Start with stacked.py. Imports reading and algebra.
"""
