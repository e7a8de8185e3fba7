"""Which variant and which flush length, by a symbolic cost model.

Goes in: a lifted state and a machine. Comes out: a `Plan`, or `Declined` with the numbers.
Start with cost.py, then predict.py and choose.py. Imports no graphs.
"""
