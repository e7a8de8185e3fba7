"""The whole way from a captured graph to programs, or to reasons.

Goes in: a captured graph. Comes out: a `LiftedGraph` with a `Lifted` for each state and a `Declined` for each candidate
that is none.
Start with lift.py; assemble.py makes the program, reasons.py the words. Imports all folders above but proof and choice.
"""
