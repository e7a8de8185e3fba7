"""The intermediate forms: a program, what was decided about it, and what it means.

Goes in: recurrences found by the lift, or written as text. Comes out: `Program` with verifier and text form, `Plan`,
and the executable meaning of a program on a dense state and on a state that owes rows.
Start with program.py, then memory.py. Never imports passes, code generation or anything that runs.
"""
