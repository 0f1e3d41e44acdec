"""What one server can do: its own CPU time for each operation, reading and writing included.

Clients in Python cannot keep a server busy from the one core that it leaves them. So its time is
measured, by its own account; and, by ``redis-benchmark`` where it is on PATH, that it does as much.
"""

from __future__ import annotations

import asyncio
import shutil
import subprocess
from collections.abc import Callable
from typing import Any

from live import LINE
from measuring import bare_client, table
from operations import CHUNK

from sessionstore import AsyncSessionStore, SessionStore
from sessionstore._server import PrivateServer
from sessionstore.lanes import Lane
from sessionstore.pipelining import command

TASKS = 64


def measure(server: PrivateServer, calls: int) -> str:
    """The table of what a core of the server does in a second."""
    bare = bare_client(server.url)

    def spent() -> float:
        used: dict[str, Any] = bare.info("cpu")
        return float(used["used_cpu_user"]) + float(used["used_cpu_sys"])

    rows: list[tuple[str, ...]] = []

    def note(name: str, done: Callable[[], int]) -> None:
        before = spent()
        count = done()
        each = (spent() - before) / count
        rows.append((name, f"{each * 1e6:.1f}", f"{1 / each:,.0f}"))

    with SessionStore.from_url(server.url) as store:
        ids = [store.create_session("claude", f"s-{n}", "/src").id for n in range(TASKS)]

        def alone(call: Callable[[], object]) -> Callable[[], int]:
            def many() -> int:
                for _ in range(calls):
                    call()
                return calls

            return many

        def claimed() -> None:
            store.claim(ids[1], ttl=3600).release()

        note("`add_output` of one chunk, a call at a time",
             alone(lambda: store.add_output(ids[0], CHUNK)))  # fmt: skip
        note(f"the same from {TASKS} asyncio tasks", lambda: _from_tasks(server.url, ids, calls))
        note("a line by a writer", lambda: _written(store, ids[2], 100 * calls))
        note("`claim` and `release`", alone(claimed))
        note("`create_session`", alone(lambda: store.create_session("claude", "new", "/src")))
        note("`get_session(tail=100)`", alone(lambda: store.get_session(ids[0], tail=100)))
        note("`get_metrics`", alone(store.get_metrics))
        saturated = _saturated(server, store, ids[3], 10 * calls)
        if saturated:
            name = "`add_output` of one chunk, 50 connections of `redis-benchmark`"
            rows.append((name, "", f"{saturated:,.0f}"))
    bare.close()
    return table(("one server's core", "µs each", "so many a second"), rows)


def _from_tasks(url: str, ids: list[str], calls: int) -> int:
    async def run() -> None:
        async with AsyncSessionStore.from_url(url) as store:

            async def append(session_id: str) -> None:
                for _ in range(calls // TASKS):
                    await store.add_output(session_id, CHUNK)

            await asyncio.gather(*map(append, ids))

    asyncio.run(run())
    return calls // TASKS * TASKS


def _saturated(server: PrivateServer, store: SessionStore, session_id: str, calls: int) -> float:
    """Appends a second as a client in C sends them, each by a lane of its own; 0 without it."""
    program = shutil.which("redis-benchmark")
    if program is None:
        return 0.0
    append = SessionStore.add_output.__wrapped__(store, session_id, CHUNK)
    words = command(append, Lane("__rand_int__")).evalsha
    options = ("-c", "50", "-n", calls, "-r", 10**9, "--csv")
    arguments = [program, "-p", server.port, *options, *words]
    done = subprocess.run([*map(str, arguments)], capture_output=True, text=True, check=True)
    return float(done.stdout.splitlines()[-1].rsplit('","', 7)[1].strip('"'))


def _written(store: SessionStore, session_id: str, lines: int) -> int:
    with store.writer(session_id) as out:
        for _ in range(lines):
            out.write(LINE)
    return lines
