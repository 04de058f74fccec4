"""One file a foreign stack: how to let it take real optimizer steps. See docs/audit-adapters.md.

An adapter is imported twice: here, for its constants, and by `run/child.py` in the stack's own environment, which
need not have thence. At import time it uses the standard library alone, and torch and the stack only inside `run`.
Adapters import one another relatively, which works in both places.
"""
