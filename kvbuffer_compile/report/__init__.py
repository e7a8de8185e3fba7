"""What was found in a function and what was decided, for people and for programs.

Goes in: the backend's decisions (records.py). Comes out: a table, HTML, a plot, a dict, a folder with all that was
generated.
Start with report.py. Never imports what runs steps.
"""
