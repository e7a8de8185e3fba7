"""What was found in a function and what was decided, for people and for programs.

Goes in: records of the backend's decisions. Comes out: a table, HTML, a plot, a dict, a folder with everything that was
generated.
Start with records.py, then report.py. Never imports what runs steps.
"""
