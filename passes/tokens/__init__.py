"""Several tokens in one call, found to be one program that is run several times.

Goes in: unrolled loops, chains, `kvbuffer::sequence` calls, fused functions. Comes out: the program of one token.
Start with periods.py. Imports reading, algebra and walk.
"""
