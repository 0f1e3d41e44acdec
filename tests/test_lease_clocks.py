"""Workers whose clocks differ by two minutes: nobody takes what another holds.

Each worker holds a session, and tries by every means to get at those of the others. In the naive
version a lease's expiry is written and judged by the workers' own clocks.
"""

from __future__ import annotations

import datetime
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from typing import Any

import pytest
from conftest import World
from consistency import assert_consistent
from lease_workers import main, plain_client, play, together
from programme import Attack, controls, proves

from sessionstore import SessionBusyError, SessionStore

SHIFTS = (0.0, 60.0, -60.0, 0.0, 60.0, -60.0)  # seconds; one worker each
TTL = 45.0  # seconds: longer than the test, and less than a clock may be ahead


@pytest.fixture
def world(server: Any) -> Iterator[World]:
    opened = World("sync", server.program.name.lower(), server.url)
    yield opened
    opened.close()


# ---- What is done --------------------------------------------------------------------------


def set_clock(shift: float) -> None:
    """Let this process's wall clock be wrong by so many seconds."""
    time_, time_ns, original = time.time, time.time_ns, datetime.datetime

    class Shifted(original):
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return original.now(tz) + datetime.timedelta(seconds=shift)

        @classmethod
        def utcnow(cls) -> Any:
            return original.utcnow() + datetime.timedelta(seconds=shift)

    time.time = lambda: time_() + shift
    time.time_ns = lambda: time_ns() + round(shift * 1e9)
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] in ("sessionstore", "redis") and (
            vars(module).get("datetime") is original
        ):
            module.datetime = Shifted
    datetime.datetime = Shifted


def grabs(url: str, namespace: str, turns: int, naive: bool) -> Any:
    """Everybody holds one session, and goes for all the others."""
    settings: Any = {"namespace": namespace, "reap_grace": 0.05}
    with SessionStore.from_url(url, **settings) as store:
        ids = [store.create_session("claude", f"s-{n}", "/src").id for n in SHIFTS]
        quiet = store.create_session("codex", "quiet", "/src").id

    def work(number: int, barrier: Any) -> Any:
        set_clock(SHIFTS[number])
        own, others = ids[number], ids[:number] + ids[number + 1 :]
        seen: Counter[str] = Counter()
        with SessionStore.from_url(url, **settings) as store, plain_client(url) as client:
            if naive:
                seen["held"] += claim_by_own_clock(store, client, own)
                barrier.wait()
                for other in others:
                    seen["tried"] += 1
                    seen["stolen"] += claim_by_own_clock(store, client, other)
                return seen
            lease = store.claim(own, ttl=TTL)
            barrier.wait()
            for turn in range(turns):
                for other in others:
                    for grab in (
                        partial(store.claim, other, expected=("active", "busy")),
                        partial(store.add_output, other, "mine"),
                        partial(store.update_status, other, "active"),
                        partial(store.delete_session, other),
                    ):
                        seen["tried"] += 1
                        with suppress(SessionBusyError):
                            grab()
                            seen["stolen"] += 1
                seen["tried"] += 1
                seen["stolen"] += len(store.reap(idle_for=TTL, ended_for=TTL))
                lease.renew()
                seen["written"] += store.add_output(own, f"line {turn}") == turn + 1
                seen["wrong"] += not 0 < lease.expires_in <= TTL
            seen["held"] += not lease.lost and store.get_session(own).owner == store.worker
            barrier.wait()
            seen["wrong"] += store.get_session(quiet).status != "active"
        return seen

    found: Counter[str] = Counter()
    for one in together(work, len(SHIFTS)):
        found.update(one)
    return found


def claim_by_own_clock(store: SessionStore, client: Any, session_id: str) -> bool:
    key = store.keyspace.of_session(session_id).session(session_id)
    expires_at = client.hget(key, "lease_expires_at")
    if expires_at is not None and float(expires_at) > time.time():
        return False
    client.hset(key, "lease_expires_at", time.time() + TTL)
    return True


# ---- What must be true of it ---------------------------------------------------------------


def tell(attack: Attack, found: dict[str, int]) -> None:
    counts = Counter(found)
    attack.tell(
        injected=counts["tried"],
        wrong=counts["stolen"] + counts["wrong"],
        workers=len(SHIFTS),
        own_writes=counts["written"],
    )


@proves("clocks", ordinary=1000, full=20_000)
def test_workers_whose_clocks_differ_steal_nothing(world: World, attack: Attack) -> None:
    a_turn = len(SHIFTS) * (4 * (len(SHIFTS) - 1) + 1)
    turns = -(-attack.size // a_turn)
    found = play(grabs, world.url or "", world.namespace, turns=turns, naive=False)

    tell(attack, found)
    assert found["held"] == len(SHIFTS)
    assert found["written"] == len(SHIFTS) * turns
    assert_consistent(world)


@controls("clocks", ordinary=30)
def test_leases_on_the_workers_own_clocks_are_stolen(world: World, attack: Attack) -> None:
    found = play(grabs, world.url or "", world.namespace, turns=1, naive=True)

    assert found["held"] == len(SHIFTS)
    tell(attack, found)


if __name__ == "__main__":
    main(globals())
