"""What a Redis Cluster costs, how evenly it is filled, and how long a slot that moves holds up."""

from __future__ import annotations

import statistics
import sys
import threading
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import redis
from measuring import in_turn, ratio, table
from operations import CHUNK

from sessionstore import SessionStore
from sessionstore._server import PrivateServer, ServerProgram

sys.path.append(str(Path(__file__).parents[2] / "tests"))

from clusters import SLOTS, PrivateCluster


def slot_of(store: SessionStore, session_id: str) -> int:
    """The hash slot of a session's keys."""
    key = store.keyspace.of_session(session_id).sessions
    return int(redis.cluster.key_slot(key.encode(), SLOTS))


def store_on(cluster: PrivateCluster, partitions: int, **settings: Any) -> SessionStore:
    """A store of a namespace that is named for the number of its partitions."""
    settings = {"namespace": f"bench-{partitions}", "partitions": partitions} | settings
    return SessionStore.from_url(cluster.url, cluster=True, **settings)


def costs(cluster: PrivateCluster, rounds: int, calls: int) -> str:
    """Operations beside the cluster client's own commands, and metrics beside those of one slot."""
    bare: Any = redis.RedisCluster.from_url(cluster.url, protocol=2)
    numbers = count()
    unbounded = {"buffer_limit": 0, "buffer_bytes": 0}
    with store_on(cluster, 16, **unbounded) as store, store_on(cluster, 1) as one:
        session = store.create_session("claude", "bench", "/src/project", "task-1", "mcp-1")
        for each in (store, one):
            for _ in range(100):
                each.create_session("claude", f"service-{next(numbers)}", "/src/project")
        key = f"{store.keyspace.of_session(session.id).prefix}session:{session.id}"
        bare.hset("bench:hash", mapping=bare.hgetall(key))

        def ours() -> None:
            store.add_output(session.id, CHUNK)

        def found() -> None:
            store.find_session_by_service_id("bench", tail=0)

        sides = [
            ("`add_output`, one chunk", ours, "`RPUSH`", lambda: bare.rpush("bench:one", CHUNK),
             "1.7"),
            ("`find_session_by_service_id(tail=0)`", found, "`HGETALL`",
             lambda: bare.hgetall("bench:hash"), "2"),
            ("`get_metrics`, 16 partitions", store.get_metrics, "with one", one.get_metrics, "4"),
        ]  # fmt: skip
        rows = [_row(rounds, calls, *side) for side in sides]
    bare.close()
    head = ("a cluster of three", "µs", "beside", "µs", "ratio", "at most")
    return table(head, rows)


def _row(
    rounds: int, calls: int, name: str, ours: Callable[[], object], beside: str,
    theirs: Callable[[], object], most: str,
) -> tuple[str, ...]:  # fmt: skip
    own, other = in_turn((ours, theirs), rounds, calls)
    medians = (f"{statistics.median(times):.0f}" for times in (own, other))
    own_us, other_us = medians
    return name, own_us, beside, other_us, f"{ratio(own, other):.2f}", most


def evenness(cluster: PrivateCluster, sessions: int) -> str:
    """How many of many sessions each of three nodes holds."""
    rows: list[tuple[object, ...]] = []
    for partitions, most in ((1, ""), (16, "1.4"), (256, "1.15")):
        held = dict.fromkeys(cluster.nodes, 0)
        with store_on(cluster, partitions, namespace=f"even-{partitions}") as store:
            for first in range(0, sessions, 1000):
                with store.batch() as batch:
                    for number in range(first, min(first + 1000, sessions)):
                        batch.create_session("claude", f"service-{number}", "/src/project")
            owners = {
                keys.sessions: cluster.owner_of(int(redis.cluster.key_slot(keys.sessions.encode())))
                for keys in store.keyspace.all
            }
            for key, node in owners.items():
                held[node] += int(cluster.admin(node).zcard(key))
        counts = sorted(held.values(), reverse=True)
        assert sum(counts) == sessions
        fullest = counts[0] * len(counts) / sessions
        rows.append((partitions, *(f"{one:,}" for one in counts), f"{fullest:.2f}", most))
    head = (f"{sessions:,} sessions, partitions", *("a node",) * 3, "fullest / fair", "at most")
    return table(head, rows)


def moving(program: ServerProgram, sessions: int, moves: int) -> str:
    """The longest append to a session whose slot moves, key by key and as a whole."""
    rows: list[tuple[object, ...]] = []
    with PrivateCluster(program) as cluster, store_on(cluster, 1) as store:
        with store.batch() as batch:
            made = [batch.create_session("claude", f"service-{n}", "/src") for n in range(sessions)]
        with store.batch() as batch:
            for outcome in made:
                batch.add_output(outcome.result().id, *[CHUNK] * 100)
        own = made[0].result().id
        slot = slot_of(store, own)
        ways: dict[str, Callable[[int, PrivateServer], object]] = {"key by key": cluster.move}
        if "MIGRATESLOTS" in str(cluster.admin(cluster.nodes[0]).execute_command("CLUSTER HELP")):
            ways["as a whole"] = cluster.move_whole
        for way, move in ways.items():
            took: list[float] = []
            longest: list[float] = []
            for _ in range(moves):
                cluster.settle()
                taken, waited = _while_moving(store, own, lambda: move(slot, _next(cluster, slot)))  # noqa: B023
                took.append(taken)
                longest.append(waited)
            rows.append(
                (way, f"{1000 * statistics.median(took):.0f}",
                 f"{1000 * statistics.median(longest):.0f}", f"{1000 * max(longest):.0f}")
            )  # fmt: skip
    head = (f"{program}: a slot with {sessions:,} sessions moves", "move: ms",
            "longest append: ms", "worst of all")  # fmt: skip
    return table(head, rows)


def _next(cluster: PrivateCluster, slot: int) -> PrivateServer:
    return cluster.next_to(cluster.owner_of(slot))


def _while_moving(
    store: SessionStore, session_id: str, move: Callable[[], object]
) -> tuple[float, float]:
    """Seconds that a move took, and the longest of the appends meanwhile."""
    is_over = threading.Event()
    waited = [0.0]

    def append() -> None:
        while not is_over.is_set():
            began = time.perf_counter()
            store.add_output(session_id, CHUNK)
            waited.append(time.perf_counter() - began)

    thread = threading.Thread(target=append)
    thread.start()
    began = time.perf_counter()
    try:
        move()
    finally:
        took = time.perf_counter() - began
        time.sleep(0.2)
        is_over.set()
        thread.join()
    return took, max(waited)
