"""What the process around a call is like, and how none of it does harm.

Goes in: nothing of ours. Comes out: surroundings kept out of our arithmetic (`neutral`), writes that no exception
divides (`at_once`), locks, forks, private files on disk; for people, who called (`callers`) and how far a compilation
is (`progress`).
Start with surroundings.py. Never imports any other folder.
"""
