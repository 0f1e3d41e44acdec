"""What is live: asyncio under load, writers, followers, and a session that grows for long."""

from __future__ import annotations

import asyncio
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from itertools import count
from typing import Any

import redis.asyncio
from measuring import bare_client, ratio, table
from operations import CHUNK

from sessionstore import AsyncSessionStore, SessionStore
from sessionstore._server import PrivateServer
from sessionstore.scripts import load

LINE = CHUNK[:-1] + "\n"  # 80 bytes with its newline
MEBIBYTE = 1024 * 1024

# ---- asyncio ------------------------------------------------------------------------------------


def coalescing(server: PrivateServer, rounds: int, calls: int) -> str:
    """Appends of many tasks: the store's, and the same scripts awaited one by one on redis-py."""
    return asyncio.run(_coalescing(server, rounds, calls))


async def _coalescing(server: PrivateServer, rounds: int, calls: int) -> str:
    bare = redis.asyncio.Redis.from_pool(
        redis.asyncio.BlockingConnectionPool.from_url(server.url, protocol=2)
    )
    sha = await bare.script_load(load("add_output").text)
    rows: list[tuple[object, ...]] = []
    async with AsyncSessionStore.from_url(server.url) as store:
        for tasks, most in ((1, "1 / 1.1"), (64, "2"), (256, "2.5")):
            ids = [(await store.create_session("claude", f"t{n}", "/src")).id for n in range(tasks)]
            sent = [AsyncSessionStore.add_output.__wrapped__(store, id, CHUNK) for id in ids]
            sequence = count(1)

            async def ours(task: int, ids: Sequence[str] = ids) -> None:
                await store.add_output(ids[task], CHUNK)

            async def theirs(
                task: int, sent: Sequence[Any] = sent, sequence: count[int] = sequence
            ) -> None:
                call = sent[task]
                keys = (call.lane(f"bench-{task}"), *call.keys)
                await bare.execute_command(
                    "EVALSHA", sha, len(keys), *keys, next(sequence), *call.args
                )

            each = max(calls // tasks, 1)
            times: tuple[list[float], list[float]] = ([], [])
            for _ in range(rounds):
                for side, taken in zip((ours, theirs), times, strict=True):
                    taken.append(await _microseconds(side, tasks, each))
            own, bare_times = (statistics.median(taken) for taken in times)
            rows.append(
                (
                    tasks,
                    f"{1e6 / own:,.0f}",
                    f"{1e6 / bare_times:,.0f}",
                    f"{ratio(times[1], times[0]):.2f}",
                    most,
                )
            )
    await bare.aclose()
    head = ("asyncio tasks that append", "calls/s", "one by one: calls/s", "ratio", "at least")
    return table(head, rows)


async def _microseconds(side: Callable[[int], Awaitable[None]], tasks: int, each: int) -> float:
    """Of one call, all tasks together."""

    async def run(task: int) -> None:
        for _ in range(each):
            await side(task)

    began = time.perf_counter()
    await asyncio.gather(*(run(task) for task in range(tasks)))
    return (time.perf_counter() - began) / (tasks * each) * 1e6


# ---- Writers ------------------------------------------------------------------------------------


class _Pipelined:
    """The simplest file of the kind: lines gathered, and pushed in a pipeline."""

    def __init__(self, bare: Any, lines_each: int) -> None:
        self._bare, self._each = bare, lines_each
        self._lines: list[str] = []
        self._size = 0

    def write(self, line: str) -> int:
        self._lines.append(line[:-1])
        self._size += len(line)
        if self._size >= 64 * 1024:
            self.flush()
        return len(line)

    def flush(self) -> None:
        lines, self._lines, self._size = self._lines, [], 0
        with self._bare.pipeline(transaction=False) as pipe:
            for first in range(0, len(lines), self._each):
                pipe.rpush("bench:lines", *lines[first : first + self._each])
            pipe.execute()


def writers(server: PrivateServer, rounds: int, lines: int) -> str:
    """Lines written by one process into one session, its buffer at its bound."""
    bare = bare_client(server.url)
    sides: dict[str, list[float]] = {"ours": [], "each": [], "many": []}
    with SessionStore.from_url(server.url) as store:
        session_id = store.create_session("claude", "writer", "/src").id

        def through(out: Any) -> float:
            write, began = out.write, time.perf_counter()
            for _ in range(lines):
                write(LINE)
            out.flush()
            return lines / (time.perf_counter() - began)

        for _ in range(rounds):
            with store.writer(session_id) as out:
                sides["ours"].append(through(out))
            bare.delete("bench:lines")
            sides["each"].append(through(_Pipelined(bare, 1)))
            bare.delete("bench:lines")
            sides["many"].append(through(_Pipelined(bare, 10_000)))
        bare.delete("bench:lines")
    bare.close()
    ours, each, many = (statistics.median(rates) for rates in sides.values())
    return table(
        ("lines of 80 bytes, one process, one session", "lines/s", "ratio", "at least"),
        [
            ("`writer`, buffer at its bound", f"{ours:,.0f}", "", "300,000"),
            (
                "the same loop, pipelined `RPUSH`, a line each, no bound",
                f"{each:,.0f}",
                f"{ratio(sides['ours'], sides['each']):.2f}",
                "0.5",
            ),
            (
                "the same loop, one `RPUSH` for 64 KiB of lines, no bound",
                f"{many:,.0f}",
                f"{ratio(sides['ours'], sides['many']):.2f}",
                "",
            ),
        ],
    )


# ---- For long -----------------------------------------------------------------------------------


def for_long(server: PrivateServer, mebibytes: int) -> str:
    """Memory of the server while so much passes through one session, bounded to 8 MiB."""
    bare = bare_client(server.url)
    per_step = mebibytes * MEBIBYTE // 8 // len(LINE)
    rows: list[tuple[object, ...]] = []
    with (
        SessionStore.from_url(server.url, buffer_limit=0) as store,
        SessionStore.from_url(server.url) as reader,
    ):
        session_id = store.create_session("claude", "long", "/src").id
        came = dropped = 0

        def read() -> None:
            nonlocal came, dropped
            for page in reader.follow_output(session_id):
                came, dropped = came + len(page.chunks), dropped + page.dropped
                assert page.cursor == came + dropped

        reading = threading.Thread(target=read)
        reading.start()
        with store.writer(session_id) as out:
            for step in range(1, 9):
                for _ in range(per_step):
                    out.write(LINE)
                out.flush()
                used = bare.info("memory")["used_memory"] / MEBIBYTE
                rows.append((f"{mebibytes * step // 8:,}", f"{used:.1f}"))
        store.update_status(session_id, "terminated")
        reading.join()
        total = store.get_session(session_id, tail=0).output_total
    bare.close()
    assert came + dropped == total == 8 * per_step
    told = (
        f"Of {total:,} entries a follower got {came:,} and was told of {dropped:,} dropped: "
        f"together {came + dropped:,}."
    )
    shown = [("MiB written", *(row[0] for row in rows)), ("MiB used", *(row[1] for row in rows))]
    return f"{table(shown[0], shown[1:])}\n\n{told}"


# ---- Followers ----------------------------------------------------------------------------------


def latencies(server: PrivateServer, entries: int) -> str:
    """From an append's return to the follower's having the entry; one session, one process."""
    rows = [
        ("`SessionStore`, a thread that follows", *_percentiles(_in_threads(server, entries))),
        (
            "`AsyncSessionStore`, a task that follows",
            *_percentiles(asyncio.run(_in_tasks(server, entries))),
        ),
    ]
    head = ("from an append to its follower", "median ms", "p99 ms")
    return table(head, [*rows, ("at most", "5", "25")])


def _percentiles(seconds: Sequence[float]) -> tuple[str, str]:
    median, p99 = statistics.median(seconds), statistics.quantiles(seconds, n=100)[98]
    return f"{median * 1000:.2f}", f"{p99 * 1000:.2f}"


def _in_threads(server: PrivateServer, entries: int) -> list[float]:
    came: list[float] = []
    returned: list[float] = []
    with (
        SessionStore.from_url(server.url) as store,
        SessionStore.from_url(server.url) as other,
    ):
        session_id = store.create_session("claude", "latency", "/src").id

        def follow() -> None:
            for page in other.follow_output(session_id):
                came.extend([time.perf_counter()] * len(page.chunks))

        following = threading.Thread(target=follow)
        following.start()
        time.sleep(0.2)
        for _ in range(entries):
            store.add_output(session_id, CHUNK)
            returned.append(time.perf_counter())
            time.sleep(0.005)
        store.update_status(session_id, "terminated")
        following.join()
    return [max(there - here, 0.0) for here, there in zip(returned, came, strict=True)]


async def _in_tasks(server: PrivateServer, entries: int) -> list[float]:
    came: list[float] = []
    returned: list[float] = []
    async with AsyncSessionStore.from_url(server.url) as store:
        session_id = (await store.create_session("claude", "latency", "/src")).id

        async def follow() -> None:
            async for page in store.follow_output(session_id):
                came.extend([time.perf_counter()] * len(page.chunks))

        following = asyncio.create_task(follow())
        await asyncio.sleep(0.2)
        for _ in range(entries):
            await store.add_output(session_id, CHUNK)
            returned.append(time.perf_counter())
            await asyncio.sleep(0.005)
        await store.update_status(session_id, "terminated")
        await following
    return [max(there - here, 0.0) for here, there in zip(returned, came, strict=True)]


FOLLOWED = 100  # sessions, a follower each


def followers(server: PrivateServer, seconds: float) -> str:
    """A hundred followers in one process, of sessions that another process writes to."""
    head = (
        f"{FOLLOWED} followers of {FOLLOWED} sessions, one asyncio process",
        "delivered/s",
        "median ms",
        "p99 ms",
    )
    paces = (
        ("10 lines a second each", 10.0),
        ("100 lines a second each", 100.0),
        ("flat out", 0.0),
    )
    return table(
        head,
        [(name, *asyncio.run(_followers(server, seconds, pace))) for name, pace in paces],
    )


async def _followers(server: PrivateServer, seconds: float, pace: float) -> tuple[str, str, str]:
    latency: list[float] = []
    async with AsyncSessionStore.from_url(server.url) as store:
        ids = [(await store.create_session("claude", f"f{n}", "/src")).id for n in range(FOLLOWED)]

        async def follow(session_id: str) -> None:
            async for page in store.follow_output(session_id):
                now = time.monotonic()
                latency.extend([now - float(entry.split()[0]) for entry in page.chunks])

        following = [asyncio.create_task(follow(session_id)) for session_id in ids]
        await asyncio.sleep(0.5)
        began = time.monotonic()
        writing = await asyncio.create_subprocess_exec(
            sys.executable, __file__, server.url, str(seconds), str(pace), stdin=subprocess.PIPE
        )
        await writing.communicate(" ".join(ids).encode())
        await asyncio.gather(*following)
        taken = time.monotonic() - began
    return f"{len(latency) / taken:,.0f}", *_percentiles(latency)


async def _write(url: str, seconds: float, pace: float, ids: Sequence[str]) -> None:
    """The process that writes: every entry begins with when it was written."""
    async with AsyncSessionStore.from_url(url) as store:
        over_at = time.monotonic() + seconds

        async def write(number: int) -> None:
            if pace:
                await asyncio.sleep(number / len(ids) / pace)
            while (now := time.monotonic()) < over_at:
                await store.add_output(ids[number], f"{now} {CHUNK}")
                if pace:
                    await asyncio.sleep(max(now + 1 / pace - time.monotonic(), 0))

        await asyncio.gather(*(write(number) for number in range(len(ids))))
        for session_id in ids:
            await store.update_status(session_id, "terminated")


if __name__ == "__main__":
    asyncio.run(
        _write(sys.argv[1], float(sys.argv[2]), float(sys.argv[3]), sys.stdin.read().split())
    )
