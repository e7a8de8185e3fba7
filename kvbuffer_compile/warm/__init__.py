"""Warm starts: AOTAutograd's cache keeps what was made of a captured graph, for the next process.

Goes in: a captured graph and the options it is compiled with. Comes out: a key for all that our part depends on, and
compiled graphs that can be kept under it (kept.py). Without a key nothing is kept, and nothing kept is used.
Start with key.py. Never imports the backend.
"""
