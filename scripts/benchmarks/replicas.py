"""What it costs to wait for a replica, which is on the same machine here."""

from __future__ import annotations

import statistics
from contextlib import ExitStack

import redis
from measuring import bare_client, in_turn, ratio, table
from operations import CHUNK

from sessionstore import SessionStore
from sessionstore._server import PrivateServer, ServerProgram


def measure(program: ServerProgram, rounds: int, calls: int) -> str:
    """The table of an append and of a claim, with ``wait_replicas`` and without."""
    at_once = ("--repl-diskless-sync-delay", "0")
    with ExitStack() as stack:
        primary, replica = (stack.enter_context(PrivateServer(program, at_once)) for _ in range(2))
        with redis.Redis(port=replica.port) as client:
            client.replicaof("127.0.0.1", primary.port)
        bare = stack.enter_context(bare_client(primary.url))
        waiting, plain = (
            stack.enter_context(SessionStore.from_url(primary.url, wait_replicas=number))
            for number in (1, 0)
        )
        first, second = (
            plain.create_session("claude", name, "/src/project").id for name in ("one", "two")
        )
        while not bare.wait(1, 1000):
            bare.incr("bench:followed")

        def bare_and_wait() -> None:
            with bare.pipeline(transaction=False) as pipe:
                pipe.rpush("bench:list", CHUNK).execute_command("WAIT", 1, 1000)
                pipe.execute()

        sides = (
            lambda: waiting.add_output(first, CHUNK),
            lambda: plain.add_output(second, CHUNK),
            bare_and_wait,
        )
        ours, without, theirs = in_turn(sides, rounds, calls)
    row = (
        "`add_output`, one chunk of 80 bytes, `wait_replicas=1`",
        f"{statistics.median(ours):.0f}",
        f"{statistics.median(without):.0f}",
        f"{ratio(ours, without):.2f}",
        f"{statistics.median(theirs):.0f}",
        f"{ratio(ours, theirs):.2f}",
    )
    head = ("a replica waited for", "µs", "without, µs", "ratio", "`RPUSH` and WAIT, µs", "ratio")
    return table(head, [row])
