"""Verify steps that stream the state: schedules in, lines of the Triton kernel out.

Start with drafts.py, the reads and the tokens; vectors.py has decays along the contracted axis and the functions that
both use. Never imports what puts a whole kernel together.
"""
