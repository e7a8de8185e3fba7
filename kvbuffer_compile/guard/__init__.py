"""States that cannot be read stale: how every access to one is noticed.

Goes in: a tensor that is about to owe rows. Comes out: the same tensor, of a class and with a dispatch key that tell us
of each access; its alias for compiled code; who else can reach its memory.
Start with guarded.py. Never imports accounts: what an access does is registered from above (runtime/access.py).
"""
