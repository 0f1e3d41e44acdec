"""Workers are killed while they claim, write and release: their sessions are found and ended.

Many workers run side by side, each with a session of its own, and each is killed at a random
moment. Two reapers look after what they leave. The naive workers do the same with one command after
the other, without a lease, and say that a write is done before it is sent.
"""

from __future__ import annotations

import itertools
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
from conftest import SERVERS, World
from consistency import assert_consistent, sessions_of
from lease_workers import Gate, Log, fork, lines_of, main, plain_client, play, seeded, wait_for
from programme import Attack, controls, proves

from sessionstore import Reaper, SessionStore, SessionStoreError
from sessionstore.models import Reaped

SIDE_BY_SIDE = 20
LIVE_CHUNKS = 100  # at least so many are looked at for each kill
CHUNKS = 5  # in one write
LONGEST_LIFE = 0.3  # seconds of work before the kill
TTL, GRACE, EVERY = 1.0, 0.3, 0.2  # seconds
#: Passes are up to 1.1 × EVERY apart: one marks, and a later one finds the mark old enough.
MARKING = GRACE + 2 * 1.1 * EVERY
MARGIN = 6.0  # for a busy machine


@pytest.fixture
def world(server: Any) -> Iterator[World]:
    opened = World("sync", server.program.name.lower(), server.url)
    yield opened
    opened.close()


one_server = pytest.mark.parametrize("server", SERVERS[:1], indirect=True)


# ---- What is done --------------------------------------------------------------------------


def crashes(url: str, namespace: str, kills: int, naive: bool) -> Any:
    """Kill workers, a few at a time; then wait until no reaper has any more to do."""
    settings: Any = {"namespace": namespace, "reap_grace": GRACE, "buffer_limit": 0}
    with SessionStore.from_url(url, **settings) as store:
        ids = [store.create_session("claude", f"s-{n}", "/src").id for n in range(kills)]
    for number in range(2):
        fork(partial(reap_for_ever, url, settings, number))

    work = work_naively if naive else work_and_be_killed
    fates: list[dict[str, Any]] = []
    for first in range(0, kills, SIDE_BY_SIDE):
        numbers = range(first, min(first + SIDE_BY_SIDE, kills))
        fates += kill_each({n: partial(work, url, settings, ids[n], n) for n in numbers})
    time.sleep(TTL + MARKING)
    with plain_client(url) as client:
        prefix = f"{{{namespace}}}:"
        wait_for(lambda: client.zcard(f"{prefix}leases") == 0, MARGIN)
        ended = client.scard(f"{prefix}sessions:status:error")
    wait_for(lambda: sum(line[2] == "lost" for line in reaped_so_far()) == ended)
    return {
        "fates": [fate | {"id": ids[fate["number"]]} for fate in fates],
        "reaped": reaped_so_far(),
    }


def reaped_so_far() -> list[list[str]]:
    """What the reapers have noted: when, of which session, what was done."""
    return [line for number in range(2) for line in lines_of(f"reaper-{number}")]


def reap_for_ever(url: str, settings: Any, number: int) -> None:
    log = Log(f"reaper-{number}")

    def note(one: Reaped) -> None:
        log.write(time.time(), one.session_id, one.action)

    store = SessionStore.from_url(url, **settings)
    with Reaper(store, every=EVERY, on_reaped=note):
        signal.pause()


def kill_each(works: dict[int, Any]) -> list[dict[str, Any]]:
    """Start a worker for each, wait until all are at work, kill each at a moment of its own."""
    rng = seeded("kills", *works)
    ready, begin = Gate(), Gate()
    workers: dict[int, int] = {}
    for number, work in works.items():
        workers[number] = fork(partial(work, ready, begin))
    for _ in workers:
        ready.wait()
    begin.let_in(len(workers))
    moments = sorted((rng.uniform(0, LONGEST_LIFE), number) for number in workers)
    fates, now = [], 0.0
    for moment, number in moments:
        time.sleep(moment - now)
        now = moment
        killed_at = time.time()
        os.kill(workers[number], signal.SIGKILL)
        _, status = os.waitpid(workers[number], 0)
        *_, last = lines_of(f"worker-{number}")
        acknowledged = [line for line in lines_of(f"worker-{number}") if line[0] == "written"]
        fates.append(
            {
                "number": number,
                "killed_at": killed_at,
                "killed": os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL,
                "last": last[0],
                "acknowledged": int(acknowledged[-1][1]) if acknowledged else 0,
            }
        )
    return fates


def work_and_be_killed(
    url: str, settings: Any, session_id: str, number: int, ready: Gate, begin: Gate
) -> None:
    store = SessionStore.from_url(url, worker=str(number), **settings)
    store.ping()
    log = Log(f"worker-{number}")
    log.write("between")
    ready.let_in()
    begin.wait()
    written = 0
    try:
        while True:
            log.write("claim")
            lease = store.claim(session_id, ttl=TTL)
            for _ in range(3):
                log.write("write")
                store.add_output(session_id, *map(str, range(written, written + CHUNKS)))
                written += CHUNKS
                log.write("written", written)
            log.write("release")
            lease.release()
            log.write("between")
    except SessionStoreError:  # the machine has been busy for longer than the lease
        log.write("lost")
        signal.pause()


def work_naively(
    url: str, settings: Any, session_id: str, number: int, ready: Gate, begin: Gate
) -> None:
    log = Log(f"worker-{number}")
    log.write("between")
    with SessionStore.from_url(url, **settings) as store, plain_client(url) as client:
        keys = store.keyspace.of_session(session_id)
        session = keys.session(session_id)
        ready.let_in()
        begin.wait()
        kept: list[str] = []
        for written in itertools.count(CHUNKS, CHUNKS):
            log.write("claim")
            client.hset(session, "status", "busy")
            client.srem(keys.by_status("active"), session_id)
            client.sadd(keys.by_status("busy"), session_id)
            log.write("write")
            log.write("written", written)
            kept += [str(n) for n in range(written - CHUNKS, written)]
            if len(kept) >= 3 * CHUNKS:
                client.rpush(keys.output(session_id), *kept)
                client.hincrby(session, "output_total", len(kept))
                client.hincrby(session, "output_bytes", sum(len(text) + 16 for text in kept))
                kept.clear()
            log.write("release")
            client.hset(session, "status", "active")
            client.srem(keys.by_status("busy"), session_id)
            client.sadd(keys.by_status("active"), session_id)
            log.write("between")


# ---- What must be true of what is left -----------------------------------------------------

#: What a session may be when its worker died at this point.
AFTERWARDS = {
    "claim": {"active", "error"},
    "write": {"error"},
    "written": {"error"},
    "release": {"active", "error"},
    "between": {"active"},
    "lost": {"error"},
}


@dataclass
class Findings:
    """What is wrong, by session; and how much was looked at."""

    not_ended: list[str]
    lost_writes: list[str]
    disagreements: str
    killed: int
    live_chunks: int
    reaped_after: list[float]  # seconds from the kill

    def tell(self, attack: Attack) -> None:
        disagreements = bool(self.disagreements)
        attack.tell(
            injected=self.killed,
            wrong=len(self.not_ended) + len(self.lost_writes) + disagreements,
            live_chunks=self.live_chunks,
            reaped=len(self.reaped_after),
        )
        assert not self.disagreements or attack.is_control, self.disagreements
        if self.reaped_after:
            print(
                f"reaped after {statistics.median(self.reaped_after):.2f} s (median), at most "
                f"{max(self.reaped_after):.2f} s; a lease lasts {TTL} s, marking {MARKING:.2f} s"
            )


def examined(world: World, seen: Any) -> Findings:
    killed_at = {fate["id"]: fate["killed_at"] for fate in seen["fates"]}
    reaped_at = {one: float(at) for at, one, action in seen["reaped"] if action == "lost"}
    sessions = sessions_of(world)
    not_ended, lost_writes, chunks = [], [], 0
    for fate in seen["fates"]:
        session_id = fate["id"]
        status = sessions[session_id]["status"]
        if status not in AFTERWARDS[fate["last"]] or (status == "error") != (
            session_id in reaped_at
        ):
            not_ended.append(f"{session_id}: killed at {fate['last']!r}, is {status}")
        stored = world.redis.lrange(world.session(session_id, ":output"), 0, -1)
        chunks += len(stored)
        beyond = len(stored) - fate["acknowledged"]  # the write that was on its way, or not
        if stored != list(map(str, range(len(stored)))) or beyond not in (0, CHUNKS):
            lost_writes.append(f"{session_id}: {len(stored)} of {fate['acknowledged']}")
    try:
        assert_consistent(world)
        disagreements = ""
    except (AssertionError, KeyError) as error:
        disagreements = str(error) or repr(error)
    return Findings(
        not_ended,
        lost_writes,
        disagreements,
        sum(fate["killed"] for fate in seen["fates"]),
        chunks,
        [at - killed_at[one] for one, at in reaped_at.items()],
    )


@one_server
@proves("kills", ordinary=40, full=900)
def test_sessions_of_killed_workers_are_ended_in_time_whole_and_with_all_writes(
    world: World, attack: Attack
) -> None:
    found = examined(
        world,
        play(
            crashes, world.url or "", world.namespace, longest=900, kills=attack.size, naive=False
        ),
    )

    found.tell(attack)
    assert max(found.reaped_after) <= TTL + MARKING + MARGIN
    assert len(found.reaped_after) >= attack.size / 4
    assert found.live_chunks >= LIVE_CHUNKS * attack.size


@one_server
@controls("kills", ordinary=20, full=40)
def test_separate_commands_leave_sessions_busy_for_ever_torn_and_short_of_writes(
    world: World, attack: Attack
) -> None:
    found = examined(
        world, play(crashes, world.url or "", world.namespace, kills=attack.size, naive=True)
    )

    found.tell(attack)
    assert found.not_ended
    assert found.lost_writes
    assert found.disagreements


@one_server
def test_a_reaped_session_names_its_lost_worker_and_is_claimed_by_another(world: World) -> None:
    seen = play(crashes, world.url or "", world.namespace, kills=10, naive=False)
    labels = {fate["id"]: f":{fate['number']} was lost" for fate in seen["fates"]}

    ended = world.store().find_sessions(status="error", tail=None)
    for session in ended:
        (line,) = session.error_buffer
        assert labels[session.id] in line
        with world.store().claim(session.id, expected=("active", "error")):
            assert world.store().get_session(session.id).status == "busy"
    assert ended


# ---- The end of an interpreter -------------------------------------------------------------

HOLDER = """
import sys, time
from sessionstore import SessionStore

store = SessionStore.from_url(sys.argv[1], namespace=sys.argv[2])
lease = store.claim(sys.argv[3], ttl=3600)
print("claimed", flush=True)
if sys.argv[4] == "waits":
    time.sleep(100)
"""


def hold(world: World, session_id: str, then: str) -> subprocess.Popen[bytes]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, world.url or "", world.namespace, session_id, then],
        stdout=subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"claimed\n"
    return process


def test_an_interpreter_that_ends_gives_its_sessions_back(world: World) -> None:
    store = world.store()
    session_id = store.create_session("claude", "s", "/src").id

    with hold(world, session_id, "ends") as process:
        assert process.wait(30) == 0

    session = store.get_session(session_id)
    assert (session.status, session.owner) == ("active", None)


def test_an_interpreter_that_is_killed_keeps_its_sessions_until_they_are_reaped(
    world: World,
) -> None:
    store = world.store()
    session_id = store.create_session("claude", "s", "/src").id

    with hold(world, session_id, "waits") as process:
        process.kill()

    session = store.get_session(session_id)
    assert (session.status, session.owner is None) == ("busy", False)


if __name__ == "__main__":
    main(globals())
