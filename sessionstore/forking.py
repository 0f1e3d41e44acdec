"""Forks while other threads are at work.

A child inherits every lock as it was, and of the threads the one that forked: a lock that another
thread held is never released. pydantic has locks of its own, and we have seen all threads of a
child wait for one. So nobody forks while a model is being validated.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

_validating = threading.RLock()


def no_fork_within(function: Callable[P, T]) -> Callable[P, T]:
    """A function during which no thread forks this process; each of its calls takes a lock."""

    @wraps(function)
    def held(*args: P.args, **kwargs: P.kwargs) -> T:
        with _validating:
            return function(*args, **kwargs)

    return held


if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_validating.acquire,
        after_in_parent=_validating.release,
        after_in_child=_validating.release,
    )
