"""The registered step ops: one for each plan, and who implements it.

Goes in: a `Plan`, a state, its cursor and rows, the operands of some tokens. Comes out: the outputs of the step; state,
cursor and rows are changed in place. The composite in plain ATen is the definition; generated kernels take precedence.
Start with composite.py, then ops.py. Never imports accounts, guards or passes.
"""
