"""What an operation costs beside the bare command that does a part of it."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from itertools import count
from typing import Any

from measuring import Work, bare_client, in_turn, ratio, server_microseconds, table

from sessionstore import SessionStore
from sessionstore._server import PrivateServer

CHUNK = "x" * 80


@dataclass(frozen=True)
class Pair:
    """An operation, the bare command beside it, and how many times that it may take at most."""

    name: str
    operation: Work
    baseline_name: str
    baseline: Work
    target: str


def pairs(store: SessionStore, unbounded: SessionStore, bare: Any) -> list[Pair]:
    """What is measured; each side has keys of its own."""
    numbers = count()
    session = store.create_session("claude", "bench", "/src/project", "task-1", "mcp-1")
    stored: dict[str, str] = bare.hgetall(f"{{agents}}:session:{session.id}")
    bare.hset("bench:hash", mapping=stored)
    hundred = [CHUNK] * 100
    one, many, trimmed = (
        store.create_session("claude", name, "/src/project").id for name in ("one", "many", "trim")
    )
    for _ in range(100):
        store.add_output(trimmed, *hundred)

    def create() -> None:
        n = next(numbers)
        store.create_session("claude", f"service-{n}", "/src/project", f"task-{n % 50}", "mcp-1")

    def hset() -> None:
        bare.hset(f"bench:hash:{next(numbers)}", mapping=stored)

    return [
        Pair(
            "`add_output`, one chunk of 80 bytes",
            lambda: unbounded.add_output(one, CHUNK),
            "`RPUSH`",
            lambda: bare.rpush("bench:one", CHUNK),
            "1.7",
        ),
        Pair(
            "`add_output`, one chunk, the buffer at its bound",
            lambda: store.add_output(trimmed, CHUNK),
            "`RPUSH`",
            lambda: bare.rpush("bench:two", CHUNK),
            "",
        ),
        Pair(
            "`add_output`, 100 chunks in one call",
            lambda: unbounded.add_output(many, *hundred),
            "`RPUSH` of 100",
            lambda: bare.rpush("bench:hundred", *hundred),
            "1.8",
        ),
        Pair("`create_session`", create, "`HSET` of its fields", hset, "2.2"),
        Pair(
            "`get_session(tail=0)`",
            lambda: store.get_session(session.id, tail=0),
            "`HGETALL`",
            lambda: bare.hgetall("bench:hash"),
            "1.8",
        ),
        Pair(
            "`find_session_by_service_id(tail=0)`",
            lambda: store.find_session_by_service_id("bench", tail=0),
            "`HGETALL`",
            lambda: bare.hgetall("bench:hash"),
            "2",
        ),
        Pair(
            "`update_activity`",
            lambda: store.update_activity(session.id),
            "`HSET` of its fields",
            lambda: bare.hset("bench:hash", mapping=stored),
            "",
        ),
        Pair("`get_metrics`", store.get_metrics, "`PING`", bare.ping, ""),
    ]


def measure(server: PrivateServer, rounds: int, calls: int) -> str:
    """The table of operations."""
    rows: list[tuple[object, ...]] = []
    bare = bare_client(server.url)
    with (
        SessionStore.from_url(server.url) as store,
        SessionStore.from_url(server.url, buffer_limit=0, buffer_bytes=0) as unbounded,
    ):
        for pair in pairs(store, unbounded, bare):
            sides = (pair.operation, pair.baseline)
            ours, theirs = in_turn(sides, rounds, calls)
            # The client's own CPU, waiting left out.
            cpu, _ = in_turn(sides, max(rounds // 4, 3), calls, time.process_time)
            rows.append(
                (
                    pair.name,
                    f"{statistics.median(ours):.0f}",
                    pair.baseline_name,
                    f"{statistics.median(theirs):.0f}",
                    f"{ratio(ours, theirs):.2f}",
                    pair.target,
                    f"{server_microseconds(bare, pair.operation, 500):.1f}",
                    f"{statistics.median(cpu):.0f}",
                )
            )
    bare.close()
    head = ("operation", "µs", "beside", "µs", "ratio", "at most", "server µs", "client CPU µs")
    return table(head, rows)
