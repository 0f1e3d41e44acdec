"""What the number of sessions does to the cost of a call, and to memory."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from itertools import islice
from typing import Any

from measuring import Work, bare_client, in_turn, ratio, table

from sessionstore import SessionStore
from sessionstore._server import PrivateServer

SLOW_US = 10_000  # no command may block the server for longer
PROJECT = "/home/me/project"


def fill(store: SessionStore, first: int, end: int) -> None:
    """Sessions number ``first`` to ``end``, as a fleet of agents would make them."""
    for n in range(first, end):
        store.create_session(
            ("claude", "codex", "gemini")[n % 3], f"service-{n}", PROJECT, f"task-{n // 4}"
        )


def costs(server: PrivateServer, sizes: list[int], rounds: int) -> tuple[str, dict[str, Any]]:
    """The table of costs by number of sessions, and its figures for the plot.

    A store with few sessions, on a server of its own, is measured in the same rounds: the ratio
    to it shows what the number of sessions costs, whatever the machine does meanwhile.
    """
    names = ("get_metrics", "find_session_by_service_id", "get_session", "add_output")
    figures: dict[str, Any] = {"sizes": sizes, "us": {n: [] for n in names}, "ratio": {}}
    figures["ratio"] = {name: [] for name in names}
    with (
        PrivateServer(server.program) as small_server,
        SessionStore.from_url(small_server.url) as small,
        SessionStore.from_url(server.url) as store,
    ):
        fill(small, 0, sizes[0])
        small_calls = _calls(small)
        filled = 0
        for size in sizes:
            fill(store, filled, size)
            filled = size
            calls = _calls(store)
            # All in the same rounds: what disturbs the machine for a second disturbs all.
            sides = [*(calls[name] for name in names), *(small_calls[name] for name in names)]
            times = in_turn(sides, rounds, 50)
            for number, name in enumerate(names):
                ours, theirs = times[number], times[number + len(names)]
                figures["us"][name].append(statistics.median(ours))
                figures["ratio"][name].append(ratio(ours, theirs))
    rows = [(f"`{name}`", *(f"{value:.2f}" for value in figures["ratio"][name])) for name in names]
    head = (f"cost beside {sizes[0]} sessions", *(f"{size:,}" for size in sizes))
    return table(head, rows), figures


def _calls(store: SessionStore) -> dict[str, Work]:
    """The calls whose cost must not depend on the number of sessions."""
    session = store.find_session_by_service_id("service-50", tail=0)
    assert session is not None
    return {
        "get_metrics": store.get_metrics,
        "find_session_by_service_id": lambda: store.find_session_by_service_id(
            "service-50", tail=0
        ),
        "get_session": lambda: store.get_session(session.id, tail=0),
        "add_output": lambda: store.add_output(session.id, "x" * 80),
    }


def listings(server: PrivateServer, rounds: int) -> str:
    """Listings of 10,000 sessions beside pipelined HGETALLs turned into dicts."""
    bare = bare_client(server.url)
    with SessionStore.from_url(server.url) as store:
        fill(store, 0, 10_000)
        keys = [f"{{agents}}:session:{session.id}" for session in store.iter_sessions()]

        def pipelined() -> list[dict[bytes, bytes]]:
            found: list[dict[bytes, bytes]] = []
            rest = iter(keys)
            while page := list(islice(rest, 1000)):
                with bare.pipeline(transaction=False) as pipe:
                    for key in page:
                        pipe.hgetall(key)
                    found += pipe.execute()
            return found

        listing: dict[str, Work] = {
            "`get_all_sessions(tail=0)`": lambda: store.get_all_sessions(tail=0),
            "`iter_sessions()`": lambda: list(store.iter_sessions()),
        }
        rows = []
        for name, call in listing.items():
            ours, theirs = in_turn((call, pipelined), rounds, 1)
            rows.append(
                (
                    name,
                    f"{statistics.median(ours) / 1000:.0f}",
                    f"{statistics.median(theirs) / 1000:.0f}",
                    f"{ratio(ours, theirs):.2f}",
                    "2.5",
                )
            )
    bare.close()
    head = ("10,000 sessions", "ms", "10,000 `HGETALL`, pipelined: ms", "ratio", "at most")
    return table(head, rows)


def slow_commands(server: PrivateServer) -> str:
    """The slowest command of each listing over all sessions, by the server's slow log."""
    bare = bare_client(server.url)
    rows: list[tuple[object, ...]] = []
    with SessionStore.from_url(server.url) as store:
        total = store.get_metrics().total_sessions
        calls: dict[str, Callable[[], Any]] = {
            "`get_all_sessions(tail=0)`": lambda: store.get_all_sessions(tail=0),
            "`iter_sessions()`": lambda: sum(1 for _ in store.iter_sessions()),
            '`find_sessions(status="active", order="-last_activity", limit=50)`': lambda: (
                store.find_sessions(status="active", order="-last_activity", limit=50)
            ),
            "`find_sessions(idle_for=3600)`": lambda: store.find_sessions(idle_for=3600),
            "`get_metrics()`": store.get_metrics,
        }
        bare.config_set("slowlog-max-len", 1000)
        for name, call in calls.items():
            bare.config_set("slowlog-log-slower-than", 100)
            bare.slowlog_reset()
            began = time.perf_counter()
            call()
            seconds = time.perf_counter() - began
            bare.config_set("slowlog-log-slower-than", -1)
            slowest = max((entry["duration"] for entry in bare.slowlog_get(1000)), default=0)
            over = sum(entry["duration"] > SLOW_US for entry in bare.slowlog_get(1000))
            rows.append((name, f"{seconds:.2f}", f"{slowest / 1000:.1f}", over))
    bare.close()
    head = (f"{total:,} sessions", "s", "slowest command: ms", "commands over 10 ms")
    return table(head, rows)


def memory(server: PrivateServer, sessions: int) -> str:
    """Bytes per session with empty buffers, and what of it each structure takes."""
    bare = bare_client(server.url)
    before = bare.info("memory")["used_memory"]
    with SessionStore.from_url(server.url) as store:
        fill(store, 0, sessions)
        after = bare.info("memory")["used_memory"]
        ids = [session.id for session in islice(store.iter_sessions(), 200)]
    prefix = "{agents}:"

    def usage(key: str) -> int:
        return int(bare.memory_usage(key, samples=0) or 0)

    def mean(keys: list[str], shared: int = 1) -> float:
        return statistics.mean(map(usage, keys)) / shared

    rows = [
        ("its hash", mean([f"{prefix}session:{id}" for id in ids])),
        (
            "its set of the service id",
            mean([f"{prefix}sessions:service:service-{n}" for n in range(200)]),
        ),
        (
            "its share of a task's set (four sessions)",
            mean([f"{prefix}sessions:task:task-{n}" for n in range(200)], 4),
        ),
        ("in the set of its type", usage(f"{prefix}sessions:type:claude") / (sessions / 3)),
        ("in the set of its status", usage(f"{prefix}sessions:status:active") / sessions),
        ("in `sessions`, by creation", usage(f"{prefix}sessions") / sessions),
        ("in `activity`", usage(f"{prefix}activity") / sessions),
        ("**all, by the server's used memory**", (after - before) / sessions),
    ]
    bare.close()
    head = (f"{sessions:,} sessions with empty buffers", "bytes per session")
    return table(head, [(name, f"{value:.0f}") for name, value in rows])
