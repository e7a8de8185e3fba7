"""Values as expressions: terms, their factors, and the coordinates of the state they are brought to.

Goes in: forms of nodes. Comes out: sums of products in which no factor runs along both axes of the state; operands as
nodes inserted in the graph.
Start with terms.py. Imports reading alone.
"""
