"""``sessionstore demo``: four worker processes run real commands as sessions in one Redis.

``agent`` stands in for a coding agent; ``worker`` is one of the processes; ``verify`` checks the
result against files that the workers kept, with plain redis-py; ``main`` puts them together.
"""
