"""How things are measured here.

Two sides are measured in the same run, with clients made alike, in short rounds that take turns,
so that a noisy machine disturbs both. Quoted are medians over the rounds, and the median of the
rounds' ratios. The cores are kept awake meanwhile.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from typing import Any

import redis

Work = Callable[[], Any]


@contextmanager
def cores_awake() -> Generator[None]:
    """Keep every core busy at the lowest priority.

    A core that falls asleep between two calls adds its waking to both sides and flatters the
    ratio: a bare RPUSH took 83 µs so, and 32 µs on cores that were awake.
    """
    spinners = [
        subprocess.Popen([sys.executable, "-c", "import os; os.nice(19)\nwhile True: pass"])
        for _ in range(os.cpu_count() or 1)
    ]
    try:
        yield
    finally:
        for spinner in spinners:
            spinner.kill()
            spinner.wait()


def bare_client(url: str) -> Any:
    """redis-py with the same pool and protocol as a store's own client."""
    return redis.Redis.from_pool(redis.BlockingConnectionPool.from_url(url, protocol=2))


def microseconds_per_call(call: Work, calls: int, clock: Callable[[], float]) -> float:
    """The time of one call by a clock, averaged over a round."""
    began = clock()
    for _ in range(calls):
        call()
    return (clock() - began) / calls * 1e6


def in_turn(
    sides: Sequence[Work], rounds: int, calls: int, clock: Callable[[], float] = time.perf_counter
) -> list[list[float]]:
    """µs per call of each side, a list over the rounds."""
    for call in sides:
        microseconds_per_call(call, min(calls, 20), clock)  # warm
    taken: list[list[float]] = [[] for _ in sides]
    for _ in range(rounds):
        for call, times in zip(sides, taken, strict=True):
            times.append(microseconds_per_call(call, calls, clock))
    return taken


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """The median of the rounds' ratios."""
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))


def server_microseconds(client: Any, call: Work, calls: int) -> float:
    """The server's time for one call of a script, by its own statistics."""
    client.config_resetstat()
    for _ in range(calls):
        call()
    # What a script calls is counted within EVALSHA too.
    outer = client.info("commandstats")["cmdstat_evalsha"]
    return float(outer["usec"] / outer["calls"])


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A table in Markdown; all columns but the first to the right."""
    lines = ["| " + " | ".join(head) + " |"]
    lines.append("|---|" + "--:|" * (len(head) - 1))
    lines += ["| " + " | ".join(map(str, row)) + " |" for row in rows]
    return "\n".join(lines)
