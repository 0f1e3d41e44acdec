"""The server is away for longer than every lease: no worker loses its session to a reaper.

Fifty sessions are held and written to; two reapers run all the while. Nobody could renew during the
outage, so afterwards all leases have expired at once, and who comes first is chance. The naive
reaper ends what has expired as soon as it sees it.
"""

from __future__ import annotations

import os
import signal
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from hashlib import sha1
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from conftest import SERVERS
from consistency import assert_consistent, sessions_of
from lease_workers import Log, fork, lines_of, main, plain_client, play, wait_for
from rawkeys import RawKeys
from redis.exceptions import RedisError
from waiting import until

import sessionstore.pipelining
from sessionstore import (
    LeaseLostError,
    OutcomeUnknownError,
    Reaper,
    SessionNotFoundError,
    SessionStore,
)
from sessionstore._server import PrivateServer
from sessionstore.scripts import Script, load

WORKERS = 10
SESSIONS = 50
REAPERS = 2
EVERY = 1.0  # seconds between two passes of a reaper
TTL, GRACE, DEADLINE = 2.0, 2.0, 4.0  # seconds; in the proportions of the defaults, about
OUTAGE = 4.0
#: A pass that marks, one that finds the mark old enough, and one more.
AFTERWARDS = GRACE + 3 * EVERY

one_server = pytest.mark.parametrize("own_server", SERVERS[:1], indirect=True)


# ---- What is done --------------------------------------------------------------------------


def hold_on(
    url: str, namespace: str, reapers: int, every: float, afterwards: float, hasty: bool
) -> Any:
    """Hold sessions until the outage is over, and some time longer."""
    settings: Any = {"namespace": namespace, "reap_grace": GRACE, "deadline": DEADLINE}
    with SessionStore.from_url(url, **settings) as store:
        ids = [store.create_session("claude", f"s-{n}", "/src").id for n in range(SESSIONS)]
    names = [f"worker-{number}" for number in range(WORKERS)]
    running = [
        fork(partial(write_now_and_then, url, settings, ids[number::WORKERS], number))
        for number in range(WORKERS)
    ]
    wait_for(lambda: len(written(names)) == SESSIONS and min(written(names).values()) >= 2)
    running += [
        fork(partial(reap_for_ever, url, settings, every, number, hasty))
        for number in range(reapers)
    ]
    Path("held").touch()

    def lost() -> set[str]:
        return {one for name in names for kind, one in lines_of(name) if kind == "lost"}

    wait_for(Path("over").exists)
    before = written(names)
    time.sleep(afterwards)
    wait_for(lambda: all(n > before[one] for one, n in written(names).items() if one not in lost()))
    Path("stop").touch()
    wait_for(lambda: all(["stopped", "-"] in lines_of(name) for name in names))
    for process in running:  # neither renewals nor marks while all is looked at
        os.kill(process, signal.SIGSTOP)
    time.sleep(0.1)
    with plain_client(url) as client:
        world = RawKeys(client, namespace)
        sessions = sessions_of(world)
        stored = {one: client.lrange(world.session(one, ":output"), 0, -1) for one in ids}
        assert_consistent(world)
    reaped = [line for n in range(reapers) for line in lines_of(f"reaper-{n}")]
    lines = [line for name in names for line in lines_of(name)]
    return {
        "held": sum(
            sessions[one]["status"] == "busy"
            and sessions[one]["owner"].endswith(f":worker-{number % WORKERS}")
            for number, one in enumerate(ids)
        ),
        "exact": sum(
            stored[one] == list(map(str, range(1, count + 1)))
            for one, count in written(names).items()
        ),
        "writes": Counter(kind for kind, _ in lines),
        "written": sum(written(names).values()),
        "written_after": sum(written(names).values()) - sum(before.values()),
        "passes": Counter(action for action, _ in reaped),
    }


def written(names: list[str]) -> dict[str, int]:
    """How many writes of each session have been acknowledged."""
    return {
        words[0].removeprefix("written:"): int(words[1])
        for name in names
        for words in lines_of(name)
        if words[0].startswith("written:")
    }


def write_now_and_then(url: str, settings: Any, own: list[str], number: int) -> None:
    """Hold sessions and write to them; a write of unknown outcome is repeated."""
    store = SessionStore.from_url(url, worker=f"worker-{number}", **settings)
    log = Log(f"worker-{number}")
    for session_id in own:
        store.claim(session_id, ttl=TTL)
    line, lost = 0, set()
    while not Path("stop").exists():
        line += 1
        for session_id in own:
            if session_id in lost:
                continue
            try:
                insist(log, store, partial(store.add_output, session_id, str(line)))
            except (LeaseLostError, SessionNotFoundError):
                lost.add(session_id)
                log.write("lost", session_id)
            else:
                log.write(f"written:{session_id}", line)
        time.sleep(0.2)
    log.write("stopped", "-")
    signal.pause()  # its leases are still renewed


def insist(log: Log, store: SessionStore, write: Callable[[], object]) -> None:
    """Write, however long the server is away."""
    while True:
        try:
            write()
            return
        except OutcomeUnknownError as error:
            log.write("unknown", type(error).__name__)
            write = partial(store.repeat, error)
        except RedisError as error:
            log.write("failed", type(error).__name__)
            time.sleep(0.1)


def reap_for_ever(url: str, settings: Any, every: float, number: int, hasty: bool) -> None:
    if hasty:
        sessionstore.pipelining.load = ending_at_once
    log = Log(f"reaper-{number}")
    store = SessionStore.from_url(url, **settings)
    with Reaper(store, every=every, on_reaped=lambda one: log.write(one.action, one.session_id)):
        signal.pause()


def ending_at_once(name: str) -> Script:
    """A script for which a lease that has expired is a worker that is lost."""
    text = load(name).text
    if name == "reap":
        marks = "if not age_ms or age_ms < 0 or age_ms > 3 * grace_ms then"
        waits = "elseif age_ms >= grace_ms and lost < most then"
        assert marks in text
        assert waits in text
        text = text.replace(marks, "if false then").replace(waits, "elseif lost < most then")
    return Script(text, sha1(text.encode()).hexdigest())


# ---- What must be true afterwards ----------------------------------------------------------


def paused(server: PrivateServer) -> None:
    server.signal(signal.SIGSTOP)
    time.sleep(OUTAGE)
    server.signal(signal.SIGCONT)


def restarted(server: PrivateServer) -> None:
    server.kill()
    time.sleep(OUTAGE)
    server.start()


def through(
    outage: Callable[[PrivateServer], None], server: PrivateServer, **parameters: Any
) -> Any:
    """What is seen of an outage."""

    def meanwhile(directory: Path) -> None:
        until(lambda: (directory / "held").exists())
        time.sleep(1.0)  # all have renewed, and the reapers run
        outage(server)
        (directory / "over").touch()

    seen = play(hold_on, server.url, f"test-{uuid4().hex[:12]}", meanwhile=meanwhile, **parameters)
    writes, passes = Counter(seen["writes"]), Counter(seen["passes"])
    print(
        f"server {outage.__name__}, away for {OUTAGE} s with leases of {TTL} s: {seen['held']} of "
        f"{SESSIONS} sessions still held, {passes['lost']} reaped, {passes['marked']} marked; "
        f"{seen['written']:,} writes, {seen['written_after']:,} of them afterwards; "
        f"{writes['unknown']} of unknown outcome repeated, {writes['failed']} failed"
    )
    return seen


@one_server
@pytest.mark.parametrize("outage", [paused, restarted])
def test_an_outage_longer_than_every_lease_costs_nobody_a_session(
    own_server: PrivateServer, outage: Callable[[PrivateServer], None]
) -> None:
    seen = through(
        outage, own_server, reapers=REAPERS, every=EVERY, afterwards=AFTERWARDS, hasty=False
    )

    assert seen["passes"].get("lost", 0) == 0
    assert (seen["held"], seen["exact"]) == (SESSIONS, SESSIONS)
    assert seen["writes"].get("unknown", 0) + seen["writes"].get("failed", 0) >= WORKERS


@one_server
def test_a_reaper_that_takes_an_expired_lease_for_a_death_ends_living_sessions(
    own_server: PrivateServer,
) -> None:
    """More of them, and in a hurry, so that one of them surely comes before some worker."""
    seen = through(restarted, own_server, reapers=4, every=0.05, afterwards=1.0, hasty=True)

    assert seen["passes"].get("lost", 0) > 0
    assert seen["held"] < SESSIONS


if __name__ == "__main__":
    main(globals())
