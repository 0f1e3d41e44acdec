"""A worker is stopped for longer than its lease, another takes over, and the first wakes up.

What it was about to write then must not land, and it must be told. The naive version is a worker
whose scripts do not check the fence.
"""

from __future__ import annotations

import os
import signal
import time
from collections import Counter
from collections.abc import Iterator
from functools import partial
from hashlib import sha1
from typing import Any

import pytest
from conftest import SERVERS, World
from consistency import assert_consistent
from lease_workers import Gate, Log, fork, lines_of, main, play, seeded, wait_for
from programme import Attack, controls, proves

import sessionstore.pipelining
from sessionstore import LeaseLostError, SessionStore
from sessionstore.scripts import Script, load

SIDE_BY_SIDE = 10
TTL = 0.5  # seconds
PAUSE = 0.005  # seconds between two writes of a worker
ATTEMPTS = 5  # of the stale worker to write, once it runs again


@pytest.fixture
def world(server: Any) -> Iterator[World]:
    opened = World("sync", server.program.name.lower(), server.url)
    yield opened
    opened.close()


one_server = pytest.mark.parametrize("server", SERVERS[:1], indirect=True)


# ---- What is done --------------------------------------------------------------------------


def stalls(url: str, namespace: str, rounds: int, unfenced: bool) -> Any:
    """Stop workers, a few at a time; take their sessions over; let them go on."""
    with SessionStore.from_url(url, namespace=namespace) as store:
        ids = [store.create_session("claude", f"s-{n}", "/src").id for n in range(rounds)]
    # All before there is a thread here: this process will hold leases itself.
    gates = [Gate() for _ in ids]
    workers = [
        fork(partial(write_on_and_on, url, namespace, ids[n], n, gates[n], unfenced))
        for n in range(rounds)
    ]
    with SessionStore.from_url(url, namespace=namespace, worker="second") as second:
        for first in range(0, rounds, SIDE_BY_SIDE):
            numbers = range(first, min(first + SIDE_BY_SIDE, rounds))
            stall_and_take_over(second, {n: (ids[n], gates[n], workers[n]) for n in numbers})
    return [
        {"id": ids[n], "outcomes": Counter(kind for kind, _ in lines_of(f"worker-{n}"))}
        for n in range(rounds)
    ]


def stall_and_take_over(second: SessionStore, rounds: dict[int, tuple[str, Gate, int]]) -> None:
    rng = seeded("stalls", *rounds)
    for _, gate, _ in rounds.values():
        gate.let_in()
    for number in rounds:
        wait_for(partial(has_written, number))
    for _, _, worker in rounds.values():
        time.sleep(rng.uniform(0, 2 * PAUSE))
        os.kill(worker, signal.SIGSTOP)
    for number, (session_id, _, worker) in rounds.items():
        lease = second.claim(session_id, ttl=120, wait=60)
        second.add_output(session_id, "taken over")
        if number % 2:  # the stale worker must be kept out by a holder, and without one too
            lease.release()
            second.add_output(session_id, "given back")
        os.kill(worker, signal.SIGCONT)
    for session_id, _, worker in rounds.values():
        os.waitpid(worker, 0)
        second.add_output(session_id, "the end")


def has_written(number: int) -> bool:
    return len(lines_of(f"worker-{number}")) >= 3


def write_on_and_on(
    url: str, namespace: str, session_id: str, number: int, gate: Gate, unfenced: bool
) -> None:
    """Write until it is over; it is, some attempts after another has written."""
    if unfenced:
        sessionstore.pipelining.load = without_fence
    store = SessionStore.from_url(url, namespace=namespace, worker=f"first-{number}")
    log = Log(f"worker-{number}")
    gate.wait()
    lease = store.claim(session_id, ttl=TTL)
    attempts, line = 0, 0
    while attempts < ATTEMPTS:
        line += 1
        try:
            store.add_output(session_id, f"first {line}")
            log.write("written", line)
        except LeaseLostError:
            log.write("refused", line)
            attempts += 1
        else:
            if store.get_session(session_id, tail=0).owner != store.worker:
                attempts += 1
        time.sleep(PAUSE)
    if not unfenced:
        for name, write in {
            "error": partial(store.add_error, session_id, "first"),
            "status": partial(store.update_status, session_id, "terminated"),
            "delete": partial(store.delete_session, session_id),
            "release": lease.release,
        }.items():
            try:
                write()
                log.write("landed", name)
            except LeaseLostError:
                log.write("refused", name)


def without_fence(name: str) -> Script:
    """A script that lets every write pass."""
    body = "  if given == 'force' then\n"
    text = load(name).text.replace(body, f"  do return nil end\n{body}")
    return Script(text, sha1(text.encode()).hexdigest())


# ---- What must be true of what is stored ---------------------------------------------------


def tell(attack: Attack, world: World, seen: list[dict[str, Any]]) -> None:
    """How many writes of the first worker landed after the second had taken over."""
    stale = written = 0
    for one in seen:
        stored = world.redis.lrange(world.session(one["id"], ":output"), 0, -1)
        taken_over = stored.index("taken over")
        own = [line for line in stored if line.startswith("first ")]
        stale += sum(line.startswith("first ") for line in stored[taken_over:])
        stale += one["outcomes"].get("landed", 0)
        written += len(own)
        # What the first worker was told is what happened: each of its writes is there, once.
        assert len(own) == len(set(own)) == one["outcomes"].get("written", 0)
        assert stored[-1] == "the end"
    refused = [one["outcomes"].get("refused", 0) for one in seen]
    attack.tell(
        injected=len(seen),
        wrong=stale,
        refused_writes=sum(refused),
        workers_refused=sum(map(bool, refused)),
        writes_before_the_pause=written,
    )


@one_server
@proves("pauses", ordinary=20, full=150)
def test_a_worker_that_wakes_up_after_its_lease_writes_nothing_and_is_told(
    world: World, attack: Attack
) -> None:
    seen = play(
        stalls, world.url or "", world.namespace, longest=600, rounds=attack.size, unfenced=False
    )

    tell(attack, world, seen)
    # In a third of the rounds at least the stale worker is seen to be refused.
    assert sum(one["outcomes"].get("refused", 0) > 0 for one in seen) >= attack.size / 3
    assert_consistent(world)


@one_server
@controls("pauses", ordinary=10)
def test_without_the_check_of_the_fence_stale_writes_land(world: World, attack: Attack) -> None:
    seen = play(stalls, world.url or "", world.namespace, rounds=attack.size, unfenced=True)

    tell(attack, world, seen)


if __name__ == "__main__":
    main(globals())
