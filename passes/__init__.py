"""Compiler passes: captured graph -> Program -> Plan -> rewritten graph.

reading/ FX nodes to forms and labels, algebra/ values as expressions, walk/ from a state forwards, tokens/ several
tokens as one program, storage/ stacks and pools, lift/ the whole way to a `Lifted` (lifted.py) or a reason, proof/ on
numbers, choice/ of a plan by cost, rewrite.py the graph with its ops.
Start with lift/lift.py. Never imports code generation or what runs steps.
"""
