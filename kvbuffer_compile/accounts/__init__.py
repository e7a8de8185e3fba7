"""What each state owes: its rows, its cursor, and which steps count.

Goes in: a state and a plan. Comes out: an `Account`, found by tensor and by memory, that can be settled, rolled back
and reconciled after a call that failed.
Start with account.py, then ledger.py; history.py is for people. Never imports graphs, passes or what runs them.
"""
