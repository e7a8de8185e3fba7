"""python -m kvbuffer_compile: doctor, explain, bench, emit.

Goes in: a command line. Comes out: text on the terminal, files, an exit code.
Start with cli.py. Nothing but `__main__` imports this folder.
"""
