"""Eight processes want the same sessions: a witness sees no double holder, and histories are sound.

Each test has its naive version beside it, *read then set*, which the same check must catch.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
from conftest import SERVERS, World
from lease_workers import main, plain_client, play, seeded, together
from linearizability import Operation, is_linearizable, overlapping
from programme import Attack, controls, proves

from sessionstore import LeaseLostError, SessionBusyError, SessionStore

RACERS = 8
CLIENTS = 4
STEPS = 5  # operations of each client in one history
NEVER = 120.0  # seconds: a lease that does not expire here

one_server = pytest.mark.parametrize("server", SERVERS[:1], indirect=True)


@pytest.fixture
def world(server: Any) -> Any:
    opened = World("sync", server.program.name.lower(), server.url)
    yield opened
    opened.close()


# ---- One race ------------------------------------------------------------------------------


def race(url: str, namespace: str, sessions: int, naive: bool) -> Any:
    """All processes claim each session at the same moment; nobody gives one back.

    The witness is a file for each session: it can be created only once.
    """
    with SessionStore.from_url(url, namespace=namespace) as store:
        ids = [store.create_session("claude", f"s-{n}", "/src").id for n in range(sessions)]

    def work(_: int, barrier: Any) -> dict[str, int]:
        seen: Counter[str] = Counter()
        with SessionStore.from_url(url, namespace=namespace) as store, plain_client(url) as client:
            for session_id in ids:
                barrier.wait()
                seen["tried"] += 1
                if naive:
                    if not claimed_naively(client, store, session_id):
                        continue
                else:
                    try:
                        store.claim(session_id, ttl=NEVER)
                    except SessionBusyError:
                        continue
                seen["claimed"] += 1
                try:
                    os.close(os.open(f"held-{session_id}", os.O_CREAT | os.O_EXCL, 0o600))
                except FileExistsError:
                    seen["double"] += 1
            barrier.wait()  # all have tried: leaving gives the sessions back
        return seen

    found: Counter[str] = Counter()
    for one in together(work, RACERS):
        found.update(one)
    found["held"] = sum(name.startswith("held-") for name in os.listdir())
    return found


def claimed_naively(client: Any, store: SessionStore, session_id: str) -> bool:
    """Read, then set."""
    key = store.keyspace.of_session(session_id).session(session_id)
    if client.hget(key, "status") != "active":
        return False
    client.hset(key, "status", "busy")
    return True


def told(attack: Attack, found: dict[str, int]) -> None:
    assert found["tried"] == RACERS * attack.size
    assert found["claimed"] == found["held"] + found.get("double", 0)
    attack.tell(injected=found["held"], wrong=found.get("double", 0), claims_tried=found["tried"])


@one_server
@proves("claim race", ordinary=500, full=5000)
def test_of_eight_processes_exactly_one_gets_each_session(world: World, attack: Attack) -> None:
    found = play(
        race, world.url or "", world.namespace, longest=600, sessions=attack.size, naive=False
    )

    told(attack, found)


@one_server
@controls("claim race", ordinary=200, full=1000)
def test_reading_the_status_and_setting_it_then_is_seen_by_the_witness(
    world: World, attack: Attack
) -> None:
    found = play(race, world.url or "", world.namespace, sessions=attack.size, naive=True)

    told(attack, found)


# ---- Histories -----------------------------------------------------------------------------


class Client:
    """One client of a history; it notes what it calls and what it is told."""

    def __init__(self, store: SessionStore, session_id: str, name: str) -> None:
        self.store, self.session_id, self.name = store, session_id, name
        self.notes: list[tuple[Any, ...]] = []
        self.lease = ""
        self._held: Any = None

    def note(self, name: str, text: str, call: Callable[[], Any], lease: str = "") -> Any:
        invoked = time.monotonic_ns()
        try:
            answer = call()
        except SessionBusyError:
            answer = "busy"
        except LeaseLostError:
            answer = "lost"
        self.notes.append((name, lease, text, answer, invoked, time.monotonic_ns()))
        return answer

    def claim(self, number: int) -> None:
        asked = f"{self.name}/{number}"
        if self.note("claim", "", self._claim, asked) == "ok":
            self.lease = asked

    def _claim(self) -> str:
        self._held = self.store.claim(self.session_id, ttl=NEVER)
        return "ok"

    def append(self, number: int) -> None:
        text = f"{self.name}:{number}"
        self.note("append", text, lambda: self._append(text), self.lease)

    def _append(self, text: str) -> int:
        return self.store.add_output(self.session_id, text)

    def release(self) -> None:
        self.note("release", "", self._release, self.lease)
        self.lease = ""

    def _release(self) -> str:
        self._held.release()
        return "ok"

    def take_away(self) -> None:
        self.note("take_away", "", self._take_away)
        self.lease = ""  # its own is over too

    def _take_away(self) -> str:
        self.store.update_status(self.session_id, "active", force=True)
        return "ok"

    def read(self) -> None:
        self.note("read", "", lambda: self.store.get_session(self.session_id).output_buffer)

    def let_go(self) -> None:
        """At the end, unrecorded."""
        if self.lease:
            with suppress(LeaseLostError):
                self._held.release()


class NaiveClient(Client):
    """Every answer is right when it is read, and may be wrong when it is acted upon."""

    def __init__(self, store: SessionStore, session_id: str, name: str, client: Any) -> None:
        super().__init__(store, session_id, name)
        keys = store.keyspace.of_session(session_id)
        self.client, self.key, self.list = client, keys.session(session_id), keys.output(session_id)

    def _holder(self) -> str:
        return self.client.hget(self.key, "owner") or ""

    def _claim(self) -> str:
        if self._holder():
            return "busy"
        self.client.hset(self.key, "owner", self.name)
        return "ok"

    def _append(self, text: str) -> Any:
        if self._holder() != (self.name if self.lease else ""):
            return "lost" if self.lease else "busy"
        return self.client.rpush(self.list, text)

    def _release(self) -> str:
        if self._holder() != self.name:
            return "lost"
        self.client.hset(self.key, "owner", "")
        return "ok"

    def _take_away(self) -> str:
        self.client.hset(self.key, "owner", "")
        return "ok"

    def let_go(self) -> None:
        pass


def histories(url: str, namespace: str, clients: int, count: int, naive: bool) -> Any:
    """So many histories, each of a session of its own; at the end of each all is read."""
    with SessionStore.from_url(url, namespace=namespace) as store:
        ids = [store.create_session("claude", f"s-{n}", "/src").id for n in range(count)]

    def work(number: int, barrier: Any) -> list[list[tuple[Any, ...]]]:
        recorded = []
        name = f"client-{number}"
        with SessionStore.from_url(url, namespace=namespace) as store, plain_client(url) as plain:
            for turn, session_id in enumerate(ids):
                rng = seeded(turn, number)
                if naive:
                    client: Client = NaiveClient(store, session_id, name, plain)
                else:
                    client = Client(store, session_id, name)
                barrier.wait()
                for at in range(STEPS):
                    one_step(client, at, rng.random())
                barrier.wait()
                if number == 0:
                    client.read()
                barrier.wait()
                client.let_go()
                recorded.append(client.notes)
        return recorded

    parts = together(work, clients)
    return [[note for part in parts for note in part[turn]] for turn in range(count)]


def one_step(client: Client, at: int, chance: float) -> None:
    if chance < 0.1:
        client.read()
    elif chance < 0.17:
        client.take_away()
    elif chance < 0.6:
        client.append(at)
    elif client.lease:
        client.release()
    else:
        client.claim(at)


def recorded(
    world: World, count: int, *, naive: bool, clients: int = CLIENTS
) -> list[list[Operation]]:
    options = {"clients": clients, "count": count, "naive": naive}
    noted = play(histories, world.url or "", world.namespace, longest=600, **options)
    return [[operation(*note) for note in history] for history in noted]


def operation(name: str, lease: str, text: str, answer: Any, *times: int) -> Operation:
    return Operation(
        name, lease, text, tuple(answer) if isinstance(answer, list) else answer, *times
    )


def unsound(found: list[list[Operation]]) -> list[list[Operation]]:
    """The histories that are not linearizable."""
    return [history for history in found if not is_linearizable(history)]


def tell(attack: Attack, found: list[list[Operation]]) -> Counter[Any]:
    answers = Counter(one.answer for history in found for one in history)
    attack.tell(
        injected=len(found),
        wrong=len(unsound(found)),
        operations=sum(map(len, found)),
        overlapping=sum(map(overlapping, found)),
        refused=answers["busy"],
        lost_leases=answers["lost"],
    )
    return answers


@one_server
@proves("histories", ordinary=200, full=2000)
def test_histories_of_claim_append_and_release_are_linearizable(
    world: World, attack: Attack
) -> None:
    found = recorded(world, attack.size, naive=False)

    answers = tell(attack, found)
    assert answers["busy"] >= attack.size
    assert answers["lost"] >= attack.size / 20
    assert sum(map(overlapping, found)) >= 5 * attack.size


@one_server
@controls("histories", ordinary=60, full=200)
def test_histories_of_checking_first_and_acting_then_are_not_all_linearizable(
    world: World, attack: Attack
) -> None:
    tell(attack, recorded(world, attack.size, naive=True))


@one_server
def test_checking_first_and_acting_then_is_right_for_one_client_alone(world: World) -> None:
    """So what the checker finds above is the race, and no other fault of the naive version."""
    assert unsound(recorded(world, 60, naive=True, clients=1)) == []


def op(name: str, lease: str, answer: Any, invoked: int, responded: int) -> Operation:
    return Operation(name, lease, "text", answer, invoked, responded)


SOUND = {
    "two claims at once, one refused": [
        op("claim", "a", "ok", 0, 9), op("claim", "b", "busy", 1, 8),
    ],
    "a claim refused before the other's answer came": [
        op("claim", "b", "busy", 3, 4), op("claim", "a", "ok", 0, 9),
    ],
    "a read in the middle of an append, of before": [
        op("append", "", 1, 0, 9), op("read", "", (), 1, 8),
    ],
    "a read in the middle of an append, of after": [
        op("append", "", 1, 0, 9), op("read", "", ("text",), 1, 8),
    ],
    "a claim, a take-over, and a write that came too late": [
        op("claim", "a", "ok", 0, 1), op("take_away", "", "ok", 2, 5),
        op("claim", "b", "ok", 4, 6), op("append", "a", "lost", 3, 9),
    ],
}  # fmt: skip
UNSOUND = {
    "two claims granted": [
        op("claim", "a", "ok", 0, 9), op("claim", "b", "ok", 1, 8),
    ],
    "a claim refused while nobody holds": [
        op("claim", "a", "busy", 0, 1), op("claim", "b", "ok", 2, 3),
    ],
    "an append forgotten": [
        op("append", "", 1, 0, 1), op("read", "", (), 2, 3),
    ],
    "two appends with one number": [
        op("append", "", 1, 0, 9), op("append", "", 1, 1, 8),
    ],
    "a write of a worker that has lost its lease": [
        op("claim", "a", "ok", 0, 1), op("take_away", "", "ok", 2, 3),
        op("claim", "b", "ok", 4, 5), op("append", "a", 1, 6, 7),
    ],
    "a lease lost that nobody took": [
        op("claim", "a", "ok", 0, 1), op("append", "a", "lost", 2, 3),
    ],
    "a write through somebody else's lease": [
        op("claim", "a", "ok", 0, 1), op("append", "", 1, 2, 3),
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", SOUND)
def test_the_checker_accepts_what_may_happen(name: str) -> None:
    assert is_linearizable(SOUND[name])


@pytest.mark.parametrize("name", UNSOUND)
def test_the_checker_finds_what_may_not_happen(name: str) -> None:
    assert not is_linearizable(UNSOUND[name])


if __name__ == "__main__":
    main(globals())
