"""A bad network: every write there is, at random faults of all kinds, happens once.

Each of the cases of ``test_exactly_once.py`` comes up as often as the others, in random order. Its
write meets one to three faults; as soon as it has run once, somebody else changes the session, so
that a second run would do something. Later, old copies of it arrive.

    sent ─ lost ─ sent ─ RUNS, reply lost ─ somebody else's write ─ sent ─ answered ─ old copies …

The other parts of this attack are in ``test_exactly_once.py`` (long sequences of appends and of
claims), ``test_batch_faults.py``, ``test_writer_crashes.py`` and ``test_contract_export.py``.
"""

from __future__ import annotations

import random
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing

import pytest
from consistency import assert_consistent
from corrupt import FAULTS, Patient
from faults import Fault, FaultyWorld, counted, seeded, weather
from programme import Attack, controls, proves
from test_exactly_once import CASES, Case, is_as_expected, outcome_of, unguarded

import sessionstore.pipelining
from sessionstore._server import PrivateServer

STYLES = ("sync", "async")
TIMEOUT_SHARE = 0.012  # of the deadline of ten seconds, in which a reply must come
DELAY = 0.3  # seconds that a reply comes late, beyond that timeout


@pytest.fixture(autouse=True)
def _short_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    """A store waits for a reply for 0.12 s instead of 2.5."""
    monkeypatch.setattr("sessionstore.connecting.READ_SHARE", TIMEOUT_SHARE)


class Trial:
    """One write in bad weather: what was promised of it and did not hold, and what it met."""

    def __init__(self, style: str, server: PrivateServer, case: Case, faults: list[Fault]) -> None:
        self.case, self.faults = case, faults
        self.broken: list[str] = []
        self.late = 0
        self.world = FaultyWorld(style, server, delay=DELAY)
        with closing(self.world):
            self._play()
            self.injected = self.world.proxy.injected
        if self.broken:
            print(f"{case.name}, {[fault.name for fault in faults]}: {', '.join(self.broken)}")

    def _play(self) -> None:
        world, case = self.world, self.case
        session_id = world.direct.create_session("claude", "service", "/src").id
        store = case.opened(world, session_id)
        before = world.contents()
        seen: list[dict[bytes, bytes]] = []  # after the first run, and after somebody else's write

        going_on = threading.Lock()

        def go_on() -> None:
            with going_on:  # this may take longer than the call waits for its reply
                if seen or (world.proxy.harmed and world.proxy.harmed[-1].reply is None):
                    return
                seen.append(world.contents())
                case.meddle(world, session_id)
                seen.append(world.contents())

        world.proxy.on_fault = go_on
        world.proxy.plan(self.faults)
        outcome = outcome_of(lambda: case.act(store, session_id))
        world.proxy.on_fault = None
        if not seen:  # all faults came before it had run
            world.proxy.harmed, harmed = [], world.proxy.harmed
            go_on()
            world.proxy.harmed = harmed
        with going_on:
            first_run, meddled = seen
        refused = isinstance(outcome, Exception) or outcome is False
        self._expect(is_as_expected(outcome, case.expected), f"answered {outcome!r}")
        self._expect((first_run == before) is refused, "carried out and refused, or neither")
        self._expect(world.contents() == meddled, "carried out twice")
        self._deliver_late(meddled, "carried out late")
        store.create_session("claude", "the lane's next write", "/src")
        self._deliver_late(world.contents(), "carried out after a later one")

    def _expect(self, holds: bool, otherwise: str) -> None:
        if not holds:
            self.broken.append(otherwise)

    def _deliver_late(self, before: dict[bytes, bytes], otherwise: str) -> None:
        for harmed in self.world.proxy.harmed:
            self.world.proxy.deliver(harmed.request)
            self.late += 1
        self._expect(self.world.contents() == before, otherwise)


def trials(
    style: str, server: PrivateServer, faults: int, cases: Sequence[Case] = CASES
) -> Iterator[Trial]:
    """So many faults, among all these cases."""
    rng = seeded()
    left = weather(rng, faults)
    while left:
        for case in rng.sample(cases, len(cases)):
            count = rng.randint(1, 3)
            planned, left = left[:count], left[count:]
            yield Trial(style, server, case, planned or weather(rng, 1, waits=0.0))


def tell(attack: Attack, done: list[Trial]) -> None:
    injected = sum((trial.injected for trial in done), Counter[Fault]())
    attack.tell(
        injected=injected.total(),
        wrong=sum(len(trial.broken) for trial in done),
        answers=len(done),
        kinds_of_writes=len({trial.case.name for trial in done}),
        late_duplicates=sum(trial.late for trial in done),
        **counted(injected),
    )


@pytest.mark.parametrize("style", STYLES)
@proves("bad network", ordinary=50, full=2_500)
def test_every_write_at_random_faults_happens_once_and_is_answered_as_it_ran(
    server: PrivateServer, style: str, attack: Attack
) -> None:
    tell(attack, list(trials(style, server, attack.size)))


@controls("bad network", ordinary=20, full=200)
def test_without_the_guard_writes_at_random_faults_happen_twice(
    server: PrivateServer, attack: Attack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sessionstore.pipelining, "load", unguarded)
    tell(attack, list(trials("sync", server, attack.size, CASES[::4])))


# ---- Repairs ------------------------------------------------------------------------------

DAMAGES = [name for name, fault in FAULTS.items() if not (fault.to_all or fault.loses)]


def damaged(world: FaultyWorld, rng: random.Random) -> None:
    """A dozen sessions, each damaged in another way, and held or free, as that needs it."""
    for name in rng.sample(DAMAGES, 12):
        own = world.direct.create_session("claude", name, "/src", "task", "mcp").id
        world.direct.add_output(own, "one", "two")
        world.direct.add_error(own, "oops")
        patient = Patient(world, own, rng)
        if not FAULTS[name].needs(patient):
            world.direct.claim(own, ttl=3600)
            world.direct._leases.end_renewal()
            patient = Patient(world, own, rng)
        FAULTS[name].do(patient)


@pytest.mark.parametrize("style", STYLES)
@proves("bad network", ordinary=6, full=100)
def test_a_repair_at_random_faults_mends_all_and_no_late_copy_of_it_does_more(
    server: PrivateServer, style: str, attack: Attack
) -> None:
    rng = seeded()
    injected: Counter[Fault] = Counter()
    wrong = repaired = late = 0
    while injected.total() < attack.size:
        with closing(FaultyWorld(style, server, delay=DELAY)) as world:
            store = world.store()
            damaged(world, rng)
            world.proxy.plan(weather(rng, 6))
            repaired += sum(one.repaired for one in store.repair())
            wrong += sum(not one.warning for one in world.direct.check())
            for one in world.direct.get_all_sessions():
                world.direct.update_status(one.id, "terminated", force=True)
            after = world.contents()
            for harmed in world.proxy.harmed:
                world.proxy.deliver(harmed.request)
                late += 1
            wrong += world.contents() != after
            for key in world.redis.scan_iter(f"{world.prefix}quarantine:*", count=1000):
                world.redis.unlink(key)
            assert_consistent(world)
            injected += world.proxy.injected
    attack.tell(
        injected=injected.total(),
        wrong=wrong,
        repaired=repaired,
        late_duplicates=late,
        **counted(injected),
    )
