"""What a claim, a release and a write under a lease cost."""

from __future__ import annotations

import statistics
from collections import deque
from typing import Any

from measuring import bare_client, in_turn, ratio, server_microseconds, table
from operations import CHUNK

from sessionstore import Lease, SessionStore
from sessionstore._server import PrivateServer

TTL = 3600.0  # seconds: no renewal in between


def measure(server: PrivateServer, rounds: int, calls: int) -> str:
    """The table of leases: claims, releases and bare HSETs take turns, and so do appends."""
    bare = bare_client(server.url)
    with SessionStore.from_url(server.url) as store:
        sessions = deque(
            store.create_session("claude", f"lease-{n}", "/src/project", "task-1", "mcp-1").id
            for n in range(calls + 20)
        )
        stored: dict[str, str] = bare.hgetall(f"{{agents}}:session:{sessions[0]}")
        leases: deque[Lease] = deque()
        held, free = (store.create_session("claude", "append", "/src").id for _ in range(2))
        lease = store.claim(held, ttl=TTL)

        def claim() -> None:
            leases.append(store.claim(sessions.popleft(), ttl=TTL))

        def release() -> None:
            given_back = leases.popleft()
            given_back.release()
            sessions.append(given_back.session_id)

        def hset() -> None:
            bare.hset("bench:hash", mapping=stored)

        claims, releases, hsets = in_turn((claim, release, hset), rounds, calls)
        under, without = in_turn(
            (lambda: store.add_output(held, CHUNK), lambda: store.add_output(free, CHUNK)),
            rounds,
            calls,
        )
        claim_us, release_us = _server_microseconds(bare, claim, release, calls)
        lease.release()
    bare.close()

    def row(name: str, ours: Any, beside: str, theirs: Any, most: str, us: str) -> tuple[str, ...]:
        medians = (f"{statistics.median(times):.0f}" for times in (ours, theirs))
        ours_us, theirs_us = medians
        return name, ours_us, beside, theirs_us, f"{ratio(ours, theirs):.2f}", most, us

    return table(
        ("leases", "µs", "beside", "µs", "ratio", "at most", "server µs"),
        [
            row("`claim`", claims, "`HSET` of a session's fields", hsets, "2.2", claim_us),
            row("`release`", releases, "`HSET` of a session's fields", hsets, "2.2", release_us),
            row("`add_output` under a lease", under, "`add_output`", without, "1.1", ""),
        ],
    )


def _server_microseconds(bare: Any, claim: Any, release: Any, calls: int) -> tuple[str, str]:
    claimed = server_microseconds(bare, claim, calls)
    return f"{claimed:.1f}", f"{server_microseconds(bare, release, calls):.1f}"
