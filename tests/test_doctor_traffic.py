"""The doctor beside workers that write: nothing healthy is touched, all damage is mended.

Real servers, real processes (``doctor_workers.py``). The control does what a naive repair does, on
the same traffic: it scans, and then removes.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import redis
from conftest import SERVERS, World
from consistency import assert_consistent
from corrupt import FAULTS, Patient
from doctor_workers import at_work, naive, traffic, watcher
from faults import seeded
from programme import Attack, controls, proves

from sessionstore._server import PrivateServer


def world_on(server: PrivateServer) -> World:
    return World("sync", server.program.name.lower(), server.url)


def wrong(problems: Any) -> list[Any]:
    return [one for one in problems if not one.warning]


def until_there_are(world: World, sessions: int) -> None:
    world.until(lambda: world.redis.zcard(f"{world.prefix}sessions") >= sessions)


@proves("doctor", ordinary=0, full=0)
def test_a_healthy_store_under_traffic_has_no_problems(
    server: PrivateServer, attack: Attack
) -> None:
    world, rng = world_on(server), seeded()
    seconds = 60.0 if attack.in_full else 0.6
    false: list[Any] = []
    store = world.store()
    try:
        with at_work(world.url or "", world.namespace, rng, traffic, traffic) as workers:
            until_there_are(world, 12)
            runs, began = 0, time.monotonic()
            while time.monotonic() < began + seconds:
                false += [*wrong(store.check()), *wrong(store.repair())]
                runs += 2
            done = [worker.end() for worker in workers]
        writes = sum(sum(one.values()) for one in done)
        assert runs >= 6
        assert writes > 100
        false += wrong(store.check())
        assert not false
        assert_consistent(world)
        attack.tell(
            injected=0, wrong=len(false), runs_on_a_healthy_store=runs, writes_meanwhile=writes
        )
    finally:
        world.close()


@controls("doctor", ordinary=1)
def test_the_control_a_naive_repair_tears_healthy_sessions_apart(
    running: Callable[[str], PrivateServer], attack: Attack
) -> None:
    world, rng = world_on(running(SERVERS[0])), seeded()
    store = world.store()
    try:
        with at_work(world.url or "", world.namespace, rng, traffic, traffic, naive) as workers:
            until_there_are(world, 12)
            harmed: list[Any] = []
            give_up = time.monotonic() + 20
            # A session that was taken out of its index is put right by its next change of status.
            while not harmed and time.monotonic() < give_up:
                harmed = wrong(store.check())
            repaired = workers.pop().end()
        attack.tell(injected=repaired["changed"], wrong=len(harmed))
    finally:
        world.close()


@proves("doctor", ordinary=60, full=500)
def test_faults_of_every_kind_under_traffic_are_mended_and_no_session_is_ever_missed(
    server: PrivateServer, attack: Attack
) -> None:
    world, rng = world_on(server), seeded()
    store = world.store()
    # What makes all sessions of an index disappear is not the doctor's doing.
    faults = {name: fault for name, fault in FAULTS.items() if not fault.to_all}
    injected: dict[str, int] = dict.fromkeys(faults, 0)
    mended = 0
    try:
        with at_work(world.url or "", world.namespace, rng, traffic, watcher) as workers:
            until_there_are(world, 16)
            give_up = time.monotonic() + 30 + attack.size / 4
            while sum(injected.values()) < attack.size or not all(injected.values()):
                assert time.monotonic() < give_up, injected
                least = sorted(faults, key=lambda name: (injected[name], rng.random()))
                for name in least[:12]:
                    injected[name] += inject(world, name, rng)
                mended += sum(one.repaired for one in wrong(store.repair()))
            _, seen = (worker.end() for worker in workers)
        for _ in range(3):  # what was damaged behind the doctor's back, in the last run
            mended += sum(one.repaired for one in wrong(store.repair()))
        left = [*wrong(store.repair()), *wrong(store.check())]
        for key in world.redis.scan_iter(f"{world.prefix}quarantine:*", count=1000):
            world.redis.unlink(key)
        assert left == []
        assert seen["missed"] == []
        assert_consistent(world)
        assert seen["looks"] >= 10
        assert mended >= attack.size // 2  # workers undo some by themselves
        attack.tell(
            injected=sum(injected.values()),
            wrong=len(left) + len(seen["missed"]),
            kinds=len(injected),
            mended=mended,
            listings_that_missed_nothing=5 * seen["looks"],
        )
    finally:
        world.close()


def inject(world: World, name: str, rng: Any) -> bool:
    """Do it to a session that is not watched; False if none is there that it can be done to."""
    fault = FAULTS[name]
    ids = [
        one
        for one in world.redis.zrange(f"{world.prefix}sessions", 0, -1)
        if not one.startswith("agent_watched_")
    ]
    rng.shuffle(ids)
    for session_id in ids:
        try:
            patient = Patient(world, session_id, rng)
            if {"status", "type", "created_at"} <= patient.fields.keys() and fault.needs(patient):
                fault.do(patient)
                return True
        except (redis.ResponseError, AssertionError, KeyError):
            continue  # it has another fault, or was deleted meanwhile
    return False
