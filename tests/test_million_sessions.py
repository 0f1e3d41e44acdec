"""A store with a million sessions: no command of any public call holds the server up for 10 ms.

The server's slow log tells. The machine may be shared, so a command that took longer counts only if
the server has used its processor for so long as well, where the system tells that (Linux), and if
it is so whenever it is tried again: a script that only reads at once and exactly as it was sent,
nine times, anything else twice with the whole call. Whether a store blocks or not makes no
difference to the server, so one style is tried.

The store is filled by a script, which is no part of what is measured, with the keys that
``create_session``, ``claim`` and ``update_status`` would have written; ``check`` finds nothing
amiss. The control reads a whole index with one command.
"""

from __future__ import annotations

import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice, product
from pathlib import Path
from typing import Any

import pytest
import redis
from conftest import PROGRAMS, SERVERS
from faults import is_write
from programme import Attack, controls, proves
from shelf import ORDERS

import sessionstore
from sessionstore import SessionStore
from sessionstore._server import PrivateServer
from sessionstore.doctor import Doctor, Place
from sessionstore.testing import memory_store

LIMIT_US = 10_000
TIMES, TIMES_THE_CALL = 10, 3
MOST_PAGES = 500
PROJECT = "/home/me/project"

# ---- The store ----------------------------------------------------------------------------------

CLOCK = (Path(sessionstore.__file__).parent / "lua" / "include" / "clock.lua").read_text("utf-8")
FILL = (
    CLOCK
    + """
local prefix, since_us = ARGV[1], tonumber(ARGV[4])
local TYPES = {'claude', 'codex', 'gemini'}
for n = tonumber(ARGV[2]), tonumber(ARGV[3]) do
  local type, status = TYPES[n % 3 + 1], 'active'
  if n % 10 < 2 then status = 'terminated' elseif n % 10 < 4 then status = 'busy'
  elseif n % 100 == 9 then status = 'error' end
  local id = string.format('agent_%s_%08x-0000-4000-8000-%012x', type, n * 2654435761 % 2^32, n)
  local service = n % 1000 == 7 and 'service-large' or 'service-' .. n
  local task = n % 5 == 0 and 'task-large' or 'task-' .. math.floor(n / 4)
  local mcp = 'mcp-' .. n % 2000   -- as many of one as are taken whole
  local us, session = since_us + n, prefix .. 'session:' .. id
  redis.call('HSET', session, 'id', id, 'type', type, 'status', status, 'created_at', iso(us),
    'last_activity', iso(us), 'service_session_id', service, 'project_path', '/home/me/project',
    'task_id', task, 'mcp_session_id', mcp)
  redis.call('ZADD', prefix .. 'sessions', integer(us), id)
  redis.call('SADD', prefix .. 'types', type)
  for name, value in pairs({type = type, status = status, service = service, task = task,
      mcp = mcp}) do
    redis.call('SADD', prefix .. 'sessions:' .. name .. ':' .. value, id)
  end
  local has_ended = status == 'terminated' or status == 'error'
  redis.call('ZADD', prefix .. (has_ended and 'ended' or 'activity'), integer(us), id)
  redis.call('XADD', prefix .. 'events', 'MAXLEN', '~', 10000, '*', 'event', 'created',
    'session_id', id, 'type', type, 'actor', 'the filler', 'status', status)
  if n % 10 == 3 then   -- held; of every other one the lease has just expired
    local owner, expires_ms = 'worker-' .. n % 40, math.floor(now_us / 1000)
    expires_ms = n % 20 == 3 and expires_ms + 86400000 or expires_ms
    redis.call('HSET', session, 'owner', owner, 'fence', '1',
      'lease_expires_at', iso(expires_ms * 1000))
    redis.call('SADD', prefix .. 'sessions:owner:' .. owner, id)
    redis.call('ZADD', prefix .. 'leases', integer(expires_ms), id)
  end
end
"""
)


class Watched(redis.Redis):
    """A client that looks at the slow log after each command of its own.

    Attributes:
        commands: how many it has sent.
        slow: those that only read and were over the limit again and again.
        suspected: others that were over the limit now.
    """

    def __init__(self, server: PrivateServer) -> None:
        self.looking: Any = redis.Redis.from_url(server.url)
        self.commands = 0
        self.slow: list[str] = []
        self.suspected: list[str] = []
        self._lock = threading.Lock()
        self._schedule = Path(f"/proc/{server.pid}/schedstat")
        super().__init__(connection_pool=redis.BlockingConnectionPool.from_url(server.url))
        self.looking.config_set("slowlog-log-slower-than", LIMIT_US)
        self.looking.config_set("slowlog-max-len", 1000)

    def execute_command(self, *words: Any, **options: Any) -> Any:
        before = self._processor_us()
        try:
            return super().execute_command(*words, **options)
        finally:
            self._look([words], before)

    def pipeline(self, *arguments: Any, **options: Any) -> Any:
        pipe: Any = super().pipeline(*arguments, **options)
        execute = pipe.execute

        def executing(*arguments: Any, **options: Any) -> Any:
            sent = [words for words, _ in pipe.command_stack]
            before = self._processor_us()
            try:
                return execute(*arguments, **options)
            finally:
                self._look(sent, before)

        pipe.execute = executing
        return pipe

    def _processor_us(self) -> float:
        """How long the server has run until now; of no use where nobody tells."""
        try:
            return int(self._schedule.read_text().split()[0]) / 1000
        except FileNotFoundError:
            return math.nan

    def _is_slow(self, before: float) -> bool:
        """Whether a command since then is in the slow log, and not because it had to wait."""
        used = self._processor_us() - before
        return bool(self.looking.slowlog_len()) and not used <= LIMIT_US

    def _look(self, sent: list[tuple[Any, ...]], before: float) -> None:
        with self._lock:
            self.commands += len(sent)
            is_slow = self._is_slow(before)
            logged = self.looking.execute_command("SLOWLOG", "GET", 1000) if is_slow else []
            for _, _, microseconds, words, *_ in logged:
                told = f"{microseconds} µs: {words}"
                matching = (one for one in sent if _as_bytes(one)[:4] == words[:4])
                again = next(matching, None)
                if again is None and words != [b"EXEC"]:
                    continue  # a script's own command: the script itself took longer
                if again is None or not _only_reads(again):
                    self.suspected.append(told)
                elif all(self._takes_long(again) for _ in range(TIMES - 1)):
                    self.slow.append(told)
            self.looking.slowlog_reset()

    def _takes_long(self, words: tuple[Any, ...]) -> bool:
        self.looking.slowlog_reset()
        before = self._processor_us()
        self.looking.execute_command(*words)
        return self._is_slow(before)


def _as_bytes(words: tuple[Any, ...]) -> list[bytes]:
    return [word if isinstance(word, bytes) else str(word).encode() for word in words]


def _only_reads(words: tuple[Any, ...]) -> bool:
    return words[0] == "EVALSHA" and not is_write(_as_bytes(words))


class Crowd:
    """A store with many sessions on a server of its own, and what calls need of it."""

    def __init__(self, server: PrivateServer, size: int) -> None:
        self._number = 0
        filler: Any = redis.Redis.from_url(server.url)
        self.client = Watched(server)
        self.store = SessionStore(self.client, worker="measured")
        self.store.ping()
        fill, since_us = filler.register_script(FILL), int((time.time() - 86_400) * 1e6)
        for first in range(0, size, 1000):
            fill(args=["{agents}:", first, min(first + 1000, size) - 1, since_us])
        filler.slowlog_reset()
        filler.close()
        self.clearing = SessionStore(self.client, retention=1000.0, worker="measured")
        self.reaping = SessionStore(self.client, reap_grace=0.1, worker="measured")
        self.own = self.store.create_session("claude", "measured", PROJECT, "task-large").id
        for own in (self.own, *(self.new() for _ in range(10))):
            self.store.add_output(own, *(f"line {n}" for n in range(10_000)))
            self.store.add_error(own, *(f"line {n}" for n in range(10_000)))

    def another(self) -> str:
        """A name that was not given yet."""
        self._number += 1
        return f"measured-{self._number}"

    def new(self) -> str:
        """A new session's id."""
        return self.store.create_session("claude", self.another(), PROJECT, "task-large").id

    def slow_commands_of(self, call: Callable[[Crowd], Any]) -> list[str]:
        """The commands of a call that are over the limit whenever they are sent."""
        for _ in range(TIMES_THE_CALL):
            self.client.suspected.clear()
            self.client.slow.clear()
            call(self)
            if not self.client.suspected:
                break
        return self.client.slow + self.client.suspected

    def close(self) -> None:
        self.store.close()
        self.client.looking.close()
        self.client.close()


@pytest.fixture(scope="module")
def crowds() -> Iterator[Callable[[int], Crowd]]:
    """A store with so many sessions, filled when it is first asked for, one of them at a time."""
    found: dict[int, Crowd] = {}
    with PrivateServer(PROGRAMS[SERVERS[0]]) as server:

        def of(size: int) -> Crowd:
            if size not in found:
                found[size] = Crowd(server, size)
            return found[size]

        yield of
        for crowd in found.values():
            crowd.close()


# ---- The calls ----------------------------------------------------------------------------------

Do = Callable[[Crowd], Any]
FILTERS: dict[str, Any] = {
    "type": "codex",
    "status": ("active", "error"),
    "task_id": "task-large",
    "mcp_session_id": "mcp-3",
    "service_session_id": "service-large",
    "owner": "worker-3",
    "idle_for": 3600,
}
NONE_MATCHES = {"task_id": "task-large", "status": "active", "owner": "worker-3"}
SMALL = {"task_id": "task-1", "type": "codex"}
COMBINED = {"task_id": "task-large", "status": ("active", "busy", "terminated"), "idle_for": 3600}


def listing(order: Any, **filters: Any) -> Do:
    return lambda crowd: crowd.store.find_sessions(order=order, limit=2000, **filters)


def every_session(crowd: Crowd) -> None:
    found = sum(1 for _ in crowd.store.iter_sessions())
    assert found == crowd.store.get_metrics().total_sessions


def claimed(crowd: Crowd) -> None:
    with crowd.store.claim(crowd.new()) as lease:
        lease.renew()


def batched(crowd: Crowd) -> None:
    with crowd.store.batch() as batch:
        for _ in range(100):
            own = batch.create_session("codex", crowd.another(), PROJECT, "task-large")
            batch.find_session_by_service_id("service-1")
            batch.update_activity(crowd.own)
    assert own.result().type == "codex"


def written(crowd: Crowd) -> None:
    with crowd.store.writer(crowd.own) as out:
        for number in range(5000):
            print("line", number, file=out)


def reaped(crowd: Crowd) -> None:
    """With hundreds of all kinds of the dead."""
    for _ in range(2):
        crowd.reaping.reap(idle_for=3600, ended_for=3600, limit=250)
        time.sleep(0.15)  # the expired are marked, and lost in the next pass


def status_changed(crowd: Crowd) -> None:
    own = crowd.new()
    crowd.store.update_status(own, "busy", expected="active")
    crowd.store.update_status(own, "terminated", force=True)


def imported(crowd: Crowd) -> None:
    """New ones, and then the same again, of which one differs by now."""
    with memory_store() as other:
        made = [other.create_session("codex", crowd.another(), PROJECT).id for _ in range(50)]
        other.add_output(made[0], *["line"] * 1000)
        lines = list(other.export_sessions())
    assert crowd.store.import_sessions(lines).imported == len(made)
    crowd.store.update_activity(made[0])
    crowd.store.import_sessions(lines, existing="replace")


LISTINGS: dict[str, Do] = {
    **{
        f"find_sessions, {order}, {name}": listing(order, **{name: value})
        for order, (name, value) in product(ORDERS, FILTERS.items())
    },
    **{f"find_sessions, {order}": listing(order) for order in ORDERS},
    "find_sessions, whole": lambda crowd: crowd.store.find_sessions(
        order="-last_activity", limit=100, tail=None
    ),
    **{f"find_sessions, {order}, small": listing(order, **SMALL) for order in ORDERS},
    **{f"find_sessions, {order}, combined": listing(order, **COMBINED) for order in ORDERS},
    **{f"find_sessions, {order}, none": listing(order, **NONE_MATCHES) for order in ORDERS},
}
READS: dict[str, Do] = {
    "ping": lambda crowd: crowd.store.ping(),
    "get_metrics": lambda crowd: crowd.store.get_metrics(),
    "drift": lambda crowd: crowd.store.drift(),
    "get_session": lambda crowd: crowd.store.get_session(crowd.own),
    "find_session": lambda crowd: crowd.store.find_session("agent_claude_none"),
    "find_session_by_service_id": lambda crowd: [
        crowd.store.find_session_by_service_id(service, live=live)
        for service, live in product(("service-1", "service-large"), (False, True))
    ],
    "read_output": lambda crowd: crowd.store.read_output(crowd.own),
    "read_errors": lambda crowd: crowd.store.read_errors(crowd.own),
    "follow_output": lambda crowd: list(islice(crowd.store.follow_output(crowd.own), 3)),
    "follow_errors": lambda crowd: list(islice(crowd.store.follow_errors(crowd.own), 3)),
    "watch": lambda crowd: list(islice(crowd.store.watch("0"), 2000)),
}
WRITES: dict[str, Do] = {
    "create_session": lambda crowd: [crowd.new() for _ in range(20)],
    "create_session, unique": lambda crowd: crowd.store.create_session(
        "claude", crowd.another(), PROJECT, unique=True
    ),
    "create_session, retention": lambda crowd: [
        crowd.clearing.create_session("claude", crowd.another(), PROJECT) for _ in range(20)
    ],
    "update_status": status_changed,
    "update_activity": lambda crowd: crowd.store.update_activity(crowd.own),
    "update_metadata": lambda crowd: crowd.store.update_metadata(crowd.own, {"a": "b"}),
    "add_output": lambda crowd: crowd.store.add_output(crowd.own, *["line"] * 1000),
    "add_error": lambda crowd: crowd.store.add_error(crowd.own, *["line"] * 1000),
    "writer": written,
    "claim": claimed,
    "batch": batched,
    "import_sessions": imported,
    "delete_session": lambda crowd: crowd.store.delete_session(crowd.new()),
    "reap": reaped,
    "reap, dry run": lambda crowd: crowd.reaping.reap(
        idle_for=3600, ended_for=3600, limit=1000, dry_run=True
    ),
}
WALKS: dict[str, Do] = {
    "iter_sessions": every_session,
    "get_all_sessions": lambda crowd: crowd.store.get_all_sessions(tail=0),
    "get_sessions_by_type": lambda crowd: crowd.store.get_sessions_by_type("codex", tail=0),
    "export_sessions": lambda crowd: sum(1 for _ in islice(crowd.store.export_sessions(), 200_000)),
    "export_sessions, filtered": lambda crowd: list(
        islice(crowd.store.export_sessions(**COMBINED), 2000)
    ),
}


def walked_by_the_doctor(crowd: Crowd, *, repairs: bool) -> None:
    """``check`` and ``repair``, but at most so many pages of each walk: all take ten minutes.

    Nothing is found but that this server has no append-only file, and leases that expired.
    """
    feed = Doctor(crowd.store.keyspace, crowd.store.settings, repairs=repairs).feed()
    place, pages = feed.first, Counter[Any]()
    while place is not None:
        walk = (place.walk, place.large[:1])
        pages[walk] += 1
        page = crowd.store.execute(feed.page(place))
        assert {problem.kind for problem in page.items} <= {"server", "lease_overdue"}, page.items
        if page.cursor is not None and pages[walk] >= MOST_PAGES:
            place = after(page.cursor)
        else:
            place = page.cursor
    assert {walk for walk, _ in pages} == {"server", "sessions", "keys", "sums"}


def after(place: Place) -> Place:
    """The beginning of what the doctor does next."""
    if place.large:
        return replace(place, large=place.large[1:], member="0")
    if place.walk == "sessions":
        return replace(place, walk="keys", scan="0")
    return replace(place, walk="sums", targets=())


DOCTOR: dict[str, Do] = {
    "check": lambda crowd: walked_by_the_doctor(crowd, repairs=False),
    "repair": lambda crowd: walked_by_the_doctor(crowd, repairs=True),
}


CALLS = LISTINGS | READS | WRITES | WALKS
#: ``repeat`` sends what another call has sent before, ``close`` what ``claim`` has; the others are
#: what the two stores' methods are made of.
APART = {"repeat", "close", "from_url", "worker", "execute", "carry", "follow", "drain"}


def test_every_public_call_is_among_those_that_are_measured() -> None:
    public = {name for name in dir(SessionStore) if not name.startswith("_")}
    assert public - APART == {name.partition(",")[0] for name in CALLS | DOCTOR}


def sessions_of(attack: Attack) -> int:
    return 1_000_000 if attack.in_full else 3_000


def measure(crowd: Crowd, calls: dict[str, Do], attack: Attack) -> None:
    slow: dict[str, list[str]] = {}
    before = crowd.client.commands
    for name, call in calls.items():
        began = time.perf_counter()
        slow[name] = crowd.slow_commands_of(call)
        seconds = time.perf_counter() - began
        print(f"{name}: {seconds:.2f} s, {len(slow[name])} slow", *slow[name][:3], sep="\n    ")
    commands = crowd.client.commands - before
    attack.tell(injected=len(calls), wrong=sum(map(len, slow.values())), commands=commands)


# The doctor first, while he is the only one who could have left something amiss.
@pytest.mark.parametrize("name", DOCTOR)
@proves("a million sessions", ordinary=1, full=1)
def test_the_doctor_has_no_slow_command(
    crowds: Callable[[int], Crowd], name: str, attack: Attack
) -> None:
    measure(crowds(sessions_of(attack)), {name: DOCTOR[name]}, attack)


@proves("a million sessions", ordinary=len(CALLS), full=len(CALLS))
def test_no_call_has_a_slow_command(crowds: Callable[[int], Crowd], attack: Attack) -> None:
    measure(crowds(sessions_of(attack)), CALLS, attack)


@controls("a million sessions", ordinary=1, full=1)
def test_reading_a_whole_index_is_slow(attack: Attack) -> None:
    """Beside a limit that is as much lower as there are fewer than a million members."""
    members = sessions_of(attack)
    with PrivateServer(PROGRAMS[SERVERS[0]]) as server:
        client: Any = redis.Redis.from_url(server.url)
        ids = [f"agent_claude_00000000-0000-4000-8000-{n:012}" for n in range(members)]
        for first in range(0, members, 10_000):
            client.sadd("index", *ids[first : first + 10_000])
        client.config_set("slowlog-log-slower-than", LIMIT_US * members // 1_000_000)
        client.slowlog_reset()
        assert len(client.smembers("index")) == members
        slow = [one for one in client.slowlog_get() if one["command"].startswith(b"SMEMBERS")]
        client.close()
    print(slow)
    attack.tell(injected=1, wrong=len(slow))
