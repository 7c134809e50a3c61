"""What Lossworks uses of libraries besides their documented interfaces: one module a library.

Each has a test in ``tests/platform/adapters`` or beside the room that uses it. After an upgrade it says in
words what is no longer there, instead of a traceback in the middle of a run.
"""
