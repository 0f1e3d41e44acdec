"""Two stores, blocking and asyncio, side by side with a model in plain Python.

Hypothesis draws the operations: every one of a store, by two workers on one namespace, with leases
that are lost, reaping, buffers that overflow and retention. After each step

- the answer, or the error with all its attributes, is the model's (``model.py``);
- the hash and the buffers of every session that the model has changed are the model's too, as a
  plain client reads them, with times between two looks at the server's clock;
- in a share of the steps (``CHECKED``; all of them in full) ``check`` finds nothing.

At the end of each run of steps all events are the model's, and the keys are recomputed from the
hashes (``consistency.py``). A pair of operation and outcome that came up too rarely fails the test.

``scripts/verify model`` takes 100,000 steps; ``FAULT_SEED`` replays.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any, ClassVar
from zlib import crc32

import hypothesis
import pytest
from conftest import FAKEREDIS, SERVERS, Awaiting, World
from consistency import assert_consistent, microseconds
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test
from model import Lease, Model, RefusedError, Session, Worker
from moments import expire_lease, iso, mark
from moments import now_us as server_now
from programme import Attack, proves

from sessionstore import AsyncSessionStore, SessionStore, SessionStoreError
from sessionstore._server import PrivateServer

SEED = "FAULT_SEED"
STEPS_A_RUN = 60  # on one namespace
CHECKED = 8  # one step in so many is followed by ``check``
MOST_SESSIONS = 9
FEWEST_DEMANDED = 2  # that something comes up once or not at all is chance

#: What must come up at least so often in 1,000 steps: about a quarter of what does.
SEEN: dict[tuple[str, str], float] = {
    ("abandon", "none"): 2,
    ("add_error", "LEASE_LOST"): 0.6,
    ("add_error", "SESSION_BUSY"): 1,
    ("add_error", "SESSION_NOT_FOUND"): 2,
    ("add_error", "total"): 10,
    ("add_output", "LEASE_LOST"): 0.6,
    ("add_output", "SESSION_BUSY"): 0.8,
    ("add_output", "SESSION_NOT_FOUND"): 2,
    ("add_output", "total"): 10,
    ("bad argument", "INVALID_ARGUMENT"): 1,
    ("batch", "done"): 29,
    ("batch", "refused"): 9,
    ("claim", "SESSION_BUSY"): 3,
    ("claim", "SESSION_NOT_ACTIVE"): 3,
    ("claim", "SESSION_NOT_FOUND"): 3,
    ("claim", "lease"): 11,
    ("create_session", "SERVICE_SESSION_IN_USE"): 2,
    ("create_session", "session"): 19,
    ("delete_session", "LEASE_LOST"): 0.4,
    ("delete_session", "SESSION_BUSY"): 0.7,
    ("delete_session", "false"): 1,
    ("delete_session", "true"): 7,
    ("drift", "answer"): 0.9,
    ("find_session", "none"): 0.4,
    ("find_session", "session"): 2,
    ("find_session_by_service_id", "none"): 2,
    ("find_session_by_service_id", "session"): 3,
    ("find_sessions", "empty"): 2,
    ("find_sessions", "some"): 1,
    ("follow_errors", "SESSION_NOT_FOUND"): 1,
    ("follow_errors", "some"): 2,
    ("follow_output", "SESSION_NOT_FOUND"): 1,
    ("follow_output", "some"): 2,
    ("get_all_sessions", "empty"): 0.1,
    ("get_all_sessions", "some"): 2,
    ("get_metrics", "answer"): 6,
    ("get_session", "SESSION_NOT_FOUND"): 1,
    ("get_session", "session"): 6,
    ("get_sessions_by_type", "empty"): 0.8,
    ("get_sessions_by_type", "some"): 2,
    ("iter_sessions", "empty"): 2,
    ("iter_sessions", "some"): 1,
    ("leave", "LEASE_LOST"): 0.1,
    ("leave", "none"): 3,
    ("ping", "true"): 0.6,
    ("read_errors", "SESSION_NOT_FOUND"): 0.3,
    ("read_errors", "page"): 1,
    ("read_errors", "page+dropped"): 0.2,
    ("read_errors", "page+ended"): 0.2,
    ("read_errors", "page+lost"): 2,
    ("read_errors", "page+lost+ended"): 0.5,
    ("read_output", "SESSION_NOT_FOUND"): 1,
    ("read_output", "page"): 3,
    ("read_output", "page+dropped"): 0.8,
    ("read_output", "page+ended"): 0.3,
    ("read_output", "page+lost"): 2,
    ("read_output", "page+lost+ended"): 0.2,
    ("reap", "deleted"): 0.3,
    ("reap", "empty"): 11,
    ("reap", "lost"): 1,
    ("reap", "marked"): 0.6,
    ("reap", "some"): 4,
    ("reap", "terminated"): 1,
    ("release", "LEASE_LOST"): 0.2,
    ("release", "SESSION_STORE_ERROR"): 0.2,
    ("release", "none"): 2,
    ("renew", "LEASE_LOST"): 0.7,
    ("renew", "SESSION_STORE_ERROR"): 1,
    ("renew", "none"): 2,
    ("update_activity", "SESSION_NOT_FOUND"): 2,
    ("update_activity", "none"): 9,
    ("update_metadata", "METADATA_LIMIT"): 0.3,
    ("update_metadata", "SESSION_NOT_FOUND"): 2,
    ("update_metadata", "none"): 10,
    ("update_status", "LEASE_LOST"): 0.5,
    ("update_status", "SESSION_BUSY"): 0.8,
    ("update_status", "SESSION_NOT_FOUND"): 4,
    ("update_status", "SESSION_STATUS"): 5,
    ("update_status", "none"): 11,
}

NEVER = "agent_claude_00000000-0000-4000-8000-000000000000"
LONG = 3600.0  # seconds: no lease is renewed in the background
GRACE, RETENTION, OLD = 10.0, 10_000.0, 100_000.0  # seconds
SETTINGS: tuple[dict[str, Any], ...] = (
    {"worker": "blocking", "buffer_limit": 4, "buffer_bytes": 0},
    {"worker": "asyncio", "buffer_limit": 6, "buffer_bytes": 150},
)
FENCED = {"update_status", "add_output", "add_error", "delete_session"}
TIMES = ("created_at", "last_activity", "lease_expires_at")

# ---- What is drawn -------------------------------------------------------------------------------

who = st.sampled_from((0, 1))
pick = st.sampled_from(range(1000))
rarely = st.sampled_from((False,) * 5 + (True,))
half = st.booleans()
mostly = st.sampled_from((True, True, False))
status = st.sampled_from(("active", "active", "active", "starting", "busy", "error", "terminated"))
expected = st.sampled_from(
    (None, None, "active", "busy", ("active", "starting", "busy"), ("error", "terminated"))
)
claimed_from = st.sampled_from(("active", ("active", "starting"), ("active", "error", "busy")))
kind = st.sampled_from(("claude", "codex", "gemini"))
service = st.sampled_from(tuple(f"service-{number}" for number in range(4)))
task = st.sampled_from((None, "task-1", "task-2"))
mcp = st.sampled_from((None, "mcp-1"))
tail = st.sampled_from((None, 0, 1, 3))
cursor = st.sampled_from((0, 0, 1, 2, 4, 7, 50))
chunk = st.sampled_from(("", "line", "漢字 😀", "a\nb", "\x00", "x" * 70, "y" * 200))
chunks = st.lists(chunk, min_size=1, max_size=5)
#: Of 64 names that a session may have.
NAMES = [{f"{size}-{number}": "v" for number in range(size)} for size in (40, 64)]
metadata = st.sampled_from(
    ({"branch": "main"}, {"branch": None}, {"cost": "1", "branch": None}, {}, *NAMES,
     dict.fromkeys(NAMES[0], None))
)  # fmt: skip
FILTERS: dict[str, Any] = {
    "type": kind,
    "status": st.sampled_from(("active", "busy", ("error", "terminated"), ("active", "busy"))),
    "task_id": st.sampled_from(("task-1", "task-2")),
    "mcp_session_id": st.just("mcp-1"),
    "service_session_id": service,
    "idle_for": st.sampled_from((0.0, 500.0)),
    "owner": who,
}
filters = st.lists(st.sampled_from(sorted(FILTERS)), max_size=2, unique=True).flatmap(
    lambda names: st.fixed_dictionaries({name: FILTERS[name] for name in names})
)
WRONG: tuple[tuple[str, tuple[Any, ...], dict[str, Any]], ...] = (
    ("update_status", (NEVER, "asleep"), {}),
    ("create_session", ("Claude", "service-0", "/"), {}),
    ("create_session", ("claude", "", "/"), {}),
    ("add_output", (NEVER,), {}),
    ("read_output", (NEVER, -1), {}),
    ("get_session", ("a\nb",), {}),
    ("find_sessions", (), {"limit": -1}),
    ("update_metadata", (NEVER, {"no spaces": "x"}), {}),
    ("claim", (NEVER,), {"ttl": 0}),
)


#: How often each rule is drawn, in parts of all, and with what. Not Hypothesis's own choice of
#: rules, which leaves out some in each run: most runs never came to an append under a lease.
RULES: dict[str, tuple[int, dict[str, Any]]] = {
    "claim": (15, {"by": who, "pick": pick, "expected": claimed_from}),
    "create": (
        5,
        {
            "by": who,
            "kind": kind,
            "service": service,
            "task": task,
            "mcp": mcp,
            "unique": half,
            "status": status,
            "noted": metadata,
        },
    ),
    "look_up": (
        7,
        {
            "by": who,
            "pick": pick,
            "tail": tail,
            "name": st.sampled_from(("get_session", "find_session", "find_session")),
        },
    ),
    "look_up_by_service": (5, {"by": who, "service": service, "tail": tail, "live": half}),
    "change_status": (
        13,
        {"by": who, "pick": pick, "status": status, "expected": expected, "force": rarely},
    ),
    "touch": (4, {"by": who, "pick": pick}),
    "append": (
        14,
        {
            "by": who,
            "pick": pick,
            "chunks": chunks,
            "name": st.sampled_from(("add_output", "add_error")),
        },
    ),
    "delete": (5, {"by": who, "pick": pick, "force": rarely}),
    "find": (
        8,
        {
            "by": who,
            "filters": filters,
            "tail": tail,
            "limit": st.sampled_from((None, 1, 3, 20)),
            "order": st.sampled_from(("created", "-last_activity")),
            "iterate": half,
        },
    ),
    "list_all": (5, {"by": who, "kind": kind, "tail": tail, "by_type": half}),
    "count_all": (
        3,
        {"by": who, "name": st.sampled_from(("get_metrics", "get_metrics", "drift", "ping"))},
    ),
    "read": (
        12,
        {
            "by": who,
            "pick": pick,
            "cursor": cursor,
            "limit": st.sampled_from((1, 2, 1000)),
            "name": st.sampled_from(("read_output", "read_errors", "read_errors")),
        },
    ),
    "follow": (
        6,
        {
            "by": who,
            "pick": pick,
            "cursor": cursor,
            "name": st.sampled_from(("follow_output", "follow_errors")),
        },
    ),
    "note": (6, {"by": who, "pick": pick, "metadata": metadata}),
    "lose_lease": (13, {"pick": pick, "marked": st.sampled_from((None, 5.0, 15.0, 15.0, 100.0))}),
    "grow_old": (10, {"pick": pick, "ended": mostly}),
    "reap": (
        10,
        {
            "by": who,
            "idle_for": st.sampled_from((None, 500.0, 500.0)),
            "ended_for": st.sampled_from((None, 1e9, 500.0, 500.0)),
            "limit": st.sampled_from((1, 2, 100)),
            "dry_run": rarely,
        },
    ),
    "ask_wrongly": (1, {"by": who, "wrong": st.sampled_from(WRONG)}),
    "batch": (
        8,
        {
            "by": who,
            "data": st.lists(
                st.tuples(st.sampled_from(range(9)), pick, status, chunks), min_size=1, max_size=6
            ),
        },
    ),
    "use_lease": (
        15,
        {
            "pick": pick,
            "name": st.sampled_from(
                ("leave", "leave", "leave", "renew", "renew", "release", "abandon")
            ),
            "status": st.sampled_from(("active", "terminated", "error")),
            "error": st.sampled_from((None, "ValueError: boom")),
        },
    ),
}
step = st.sampled_from(
    [name for name, (weight, _) in RULES.items() for _ in range(weight)]
).flatmap(lambda name: st.tuples(st.just(name), st.fixed_dictionaries(RULES[name][1])))


class Bench:
    """One target for all runs on it: clients, an event loop, and what has been seen."""

    def __init__(self, target: str, url: str | None, partitions: int, *, checked: int) -> None:
        self.target, self.url, self.partitions, self.checked = target, url, partitions, checked
        self.seen = Counter[tuple[str, str]]()
        self.steps = 0
        self.world = World("async", target, url, partitions)
        self.client = self.world.client()

    def stores(self) -> tuple[Any, Any]:
        """A blocking and an asyncio store on a fresh namespace."""
        world = self.world
        assert world.runner is not None
        common: dict[str, Any] = {"retention": RETENTION, "reap_grace": GRACE}
        common |= {"namespace": world.namespace, "partitions": self.partitions}
        one = SessionStore(self.client, **common, **SETTINGS[0])
        two = world.store(**common, **SETTINGS[1])
        return one, two

    def fresh(self) -> World:
        """The world with a namespace of its own for one run."""
        self.world.close()
        self.world = World("async", self.target, self.url, self.partitions)
        self.client = self.world.client()
        return self.world

    def close(self) -> None:
        self.world.close()


def outcome_of(answer: Any) -> str:
    """The kind of an answer, to be counted."""
    if answer is None or isinstance(answer, bool):
        return str(answer).lower()
    if isinstance(answer, int):
        return "total"
    if isinstance(answer, list):
        return "some" if answer else "empty"
    if isinstance(answer, dict) and "chunks" in answer:
        flags = [name for name in ("dropped", "lost", "ended", "deleted") if answer[name]]
        return "+".join(["page", *flags])
    return "session" if isinstance(answer, dict) and "id" in answer else "answer"


def plain(answer: Any) -> Any:
    """An answer of the library in the model's terms: built-in types, times in µs."""
    if isinstance(answer, (list, tuple)):
        return [plain(one) for one in answer]
    if isinstance(answer, datetime):
        return (answer - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(microseconds=1)
    if hasattr(answer, "model_dump"):
        found = {name: plain(value) for name, value in answer.model_dump().items()}
        return {name: value for name, value in found.items() if name not in ("read_at", "reason")}
    return answer


class Machine(RuleBasedStateMachine):
    """One run on one namespace."""

    bench: ClassVar[Bench]

    def __init__(self) -> None:
        super().__init__()
        self.world = self.bench.fresh()
        self.stores = self.bench.stores()
        self.model = Model(self.world.prefix_of, self.world.prefixes)
        self.workers = [
            Worker(
                getattr(store, "store", store).worker,
                settings["buffer_limit"],
                settings["buffer_bytes"],
                RETENTION,
                GRACE,
            )
            for store, settings in zip(self.stores, SETTINGS, strict=True)
        ]
        self.leases: list[tuple[int, Any, Lease]] = []
        self.before = server_now(self.world)

    # ---- One step ----------------------------------------------------------------------------

    def ask(self, by: int, operation: str, *args: Any, **options: Any) -> Any:
        """Have a store and the model do the same, and compare; the store's answer."""

        def real() -> Any:
            answer = getattr(self.stores[by], operation)(*args, **options)
            return list(answer) if operation.startswith(("iter", "follow")) else answer

        def expect(answer: Any) -> Any:
            own = {"new_id": answer and answer.id} if operation == "create_session" else {}
            return getattr(self.model, operation)(self.workers[by], *args, **options, **own)

        return self.compare(operation, real, expect)

    def compare(self, operation: str, real: Callable[[], Any], expect: Callable[[Any], Any]) -> Any:
        answer, error = None, None
        try:
            answer = real()
        except SessionStoreError as refused:
            error = refused
        self.model.now_us = time.time() * 1e6
        wanted, refusal = self.ask_model(expect, answer)
        after = self.look()
        self.judge(operation, (answer, error), (wanted, refusal), after)
        self.finish(after)
        return answer

    def ask_model(
        self, expect: Callable[[Any], Any], answer: Any
    ) -> tuple[Any, RefusedError | None]:
        try:
            return expect(answer), None
        except RefusedError as refused:
            return None, refused

    def judge(
        self,
        operation: str,
        found: tuple[Any, SessionStoreError | None],
        wanted: tuple[Any, RefusedError | None],
        after: int,
        *,
        in_batch: bool = False,
    ) -> None:
        (answer, error), (expectation, refusal) = found, wanted
        if error is not None or refusal is not None:
            assert refusal is not None, f"{operation} raised {error!r}, the model did not"
            assert error is not None, f"{operation} gave {answer!r}, the model {refusal}"
            assert error.code == refusal.code, f"{error!r}, the model {refusal}"
            self.compare_attributes(error, dict(refusal.attributes), after)
            self.count(operation, error.code)
            return
        if callable(expectation):
            expectation = expectation()
        shown = expectation
        if isinstance(expectation, Lease):
            assert answer.session_id == expectation.session_id
            assert answer.fence == expectation.fence
            shown = None
        else:
            answer = plain(answer)
            if in_batch and isinstance(shown, dict) and "id" in shown:
                shown = {name: v for name, v in shown.items() if name not in TIMES}
                answer = {name: v for name, v in answer.items() if name not in TIMES}
            assert answer == shown, operation
        self.count(operation, "lease" if isinstance(expectation, Lease) else outcome_of(shown))
        if operation == "reap":
            for one in shown:
                self.count(operation, one["action"])

    def compare_attributes(
        self, error: SessionStoreError, attributes: dict[str, Any], after: int
    ) -> None:
        expires_us = attributes.pop("expires_us", None)
        if expires_us is not None:
            assert error.expires_in is not None
            left = expires_us - error.expires_in * 1e6
            assert self.before - 1 <= left <= after + 1
        else:
            assert error.expires_in is None
        for name, value in attributes.items():
            got = getattr(error, name)
            assert got in value if isinstance(value, set) else got == value, (error, name, value)

    def count(self, operation: str, outcome: str) -> None:
        self.bench.seen[operation, outcome] += 1

    def look(self) -> int:
        """See what is stored of the sessions that the model has changed; the time of that look."""
        changed = [s for s in self.model.sessions.values() if s.touched]
        gone = [i for i in self.model.deleted if i not in self.seen_gone]
        self.seen_gone.update(gone)
        client: Any = self.world.redis
        with client.pipeline(transaction=False) as pipe:
            for session in changed:
                key = self.world.session(session.id)
                pipe.hgetall(key)
                pipe.lrange(f"{key}:output", 0, -1)
                pipe.lrange(f"{key}:errors", 0, -1)
                pipe.zscore(f"{session.partition}ended", session.id)
            for session_id in gone:
                key = self.world.session(session_id)
                pipe.exists(key, f"{key}:output", f"{key}:errors")
            pipe.time()
            *found, (seconds, us) = pipe.execute()
        after = int(seconds) * 1_000_000 + int(us)
        for number, session in enumerate(changed):
            self.adopt(session, *found[4 * number : 4 * number + 4], after)
        assert not any(found[4 * len(changed) :]), "keys of a deleted session are left"
        return after

    def adopt(
        self,
        session: Session,
        fields: dict[str, str],
        output: list[str],
        errors: list[str],
        ended: float | None,
        after: int,
    ) -> None:
        """Take times from what is stored, within bounds; all else must be as in the model."""
        touched, before = session.touched, self.before
        session.touched = set()
        if "created" in touched:
            session.created_us = microseconds(fields["created_at"])
            assert before <= session.created_us <= after
        if "last" in touched:
            session.last_us = microseconds(fields["last_activity"])
            assert before <= session.last_us <= after
        if "ended" in touched:
            assert ended is not None
            session.ended_us = int(ended)
            assert before <= session.ended_us <= after
        if "marked" in touched:
            session.marked_ms = int(fields["reap_seen_ms"])
            assert before // 1000 <= session.marked_ms <= after // 1000
        if "expires" in touched:
            session.expires_ms = microseconds(fields["lease_expires_at"]) // 1000
            assert before // 1000 <= session.expires_ms - session.ttl_ms <= after // 1000
        if "fence" in touched:
            old, session.fence = session.fence, int(fields["fence"])
            if old is not None and old >= before // 1000:
                assert old < session.fence <= max(old + 1, after // 1000)
            else:
                assert before // 1000 <= session.fence <= after // 1000
            for worker in self.workers:
                if worker.name == session.owner:
                    worker.held[session.id].fence = session.fence
        assert fields == session.stored()
        assert output == session.output.entries
        assert errors == session.error.entries
        assert (None if ended is None else int(ended)) == session.ended_us

    def finish(self, after: int) -> None:
        self.before = after
        self.bench.steps += 1
        if self.bench.steps % self.bench.checked == 0:
            by = self.bench.steps // self.bench.checked % 2
            assert [one for one in self.stores[by].check() if not one.warning] == []

    # ---- Which session -----------------------------------------------------------------------

    def some(self, pick: int, fits: Callable[[Session], object] | None = None) -> str:
        """Mostly one that is there, and that fits; else one that was deleted, or never was."""
        chance, number = pick % 20, pick // 20
        sessions = list(self.model.sessions.values())
        fitting = [s for s in sessions if fits is not None and fits(s)]
        if chance < 12 and fitting:
            return fitting[number % len(fitting)].id
        if chance < 18 and sessions:
            return sessions[number % len(sessions)].id
        deleted = list(self.model.deleted)
        return deleted[number % len(deleted)] if deleted and chance < 19 else NEVER

    def mine(self, by: int) -> Callable[[Session], bool]:
        """Whether a worker may well write to it, or has lost it."""
        held = self.workers[by].held
        return lambda session: session.owner is None or session.id in held

    def is_taken_away(self, lease: Lease) -> bool:
        """Whether others hold what a worker has not given back."""
        session = self.model.sessions.get(lease.session_id)
        taken = session is None or (session.owner is not None and session.fence != lease.fence)
        return taken and not lease.released and not lease.abandoned

    def claimable(self, session: Session) -> bool:
        was_held = session.owner is not None and not session.is_live(self.before)
        return session.status == "active" or was_held

    # ---- The rules ---------------------------------------------------------------------------

    @initialize(kinds=st.lists(kind, min_size=3, max_size=3))
    def begin(self, kinds: list[str]) -> None:
        self.seen_gone: set[str] = set()
        self.ask(len(kinds[0]) % 2, "get_all_sessions")
        for number, one in enumerate(kinds):
            self.ask(number % 2, "create_session", one, f"service-{number}", "/src", "task-1")

    @rule(step=step)
    def step(self, step: tuple[str, dict[str, Any]]) -> None:
        name, arguments = step
        getattr(self, name)(**arguments)

    def create(
        self,
        by: int,
        kind: str,
        service: str,
        task: str | None,
        mcp: str | None,
        unique: bool,
        status: str,
        noted: dict[str, str | None],
    ) -> None:
        if len(self.model.sessions) >= MOST_SESSIONS:
            self.ask(by, "delete_session", next(iter(self.model.sessions)), force=True)
            return
        self.ask(
            by, "create_session", kind, service, "/é", task, mcp, status=status, unique=unique,
            metadata={name: value for name, value in noted.items() if value is not None},
        )  # fmt: skip

    def look_up(self, by: int, pick: int, tail: int | None, name: str) -> None:
        self.ask(by, name, self.some(pick), tail=tail)

    def look_up_by_service(self, by: int, service: str, tail: int | None, live: bool) -> None:
        self.ask(by, "find_session_by_service_id", service, tail=tail, live=live)

    def change_status(self, by: int, pick: int, status: str, expected: Any, force: bool) -> None:
        session_id = self.some(pick, self.mine(by))
        self.ask(by, "update_status", session_id, status, expected=expected, force=force)

    def touch(self, by: int, pick: int) -> None:
        self.ask(by, "update_activity", self.some(pick))

    def append(self, by: int, pick: int, chunks: list[str], name: str) -> None:
        session_id = self.some(pick, self.mine(by))
        self.ask(by, name, session_id, *chunks)

    def delete(self, by: int, pick: int, force: bool) -> None:
        self.ask(by, "delete_session", self.some(pick), force=force)

    def find(
        self,
        by: int,
        filters: dict[str, Any],
        tail: int | None,
        limit: int | None,
        order: str,
        iterate: bool,
    ) -> None:
        if "owner" in filters:
            filters = filters | {"owner": self.workers[filters["owner"]].name}
        if iterate:
            self.ask(by, "iter_sessions", **filters, tail=tail)
        else:
            self.ask(by, "find_sessions", **filters, tail=tail, limit=limit, order=order)

    def list_all(self, by: int, kind: str, tail: int | None, by_type: bool) -> None:
        if by_type:
            self.ask(by, "get_sessions_by_type", kind, tail=tail)
        else:
            self.ask(by, "get_all_sessions", tail=tail)

    def count_all(self, by: int, name: str) -> None:
        self.ask(by, name)

    def read(self, by: int, pick: int, cursor: int, limit: int, name: str) -> None:
        which = "output" if name == "read_output" else "error"

        def fits(session: Session) -> bool:
            return getattr(session, which).total > 0 and (session.ended or limit == 1)

        self.ask(by, name, self.some(pick, fits), cursor, limit)

    def follow(self, by: int, pick: int, cursor: int, name: str) -> None:
        ended = [s.id for s in self.model.sessions.values() if s.ended]
        choice = [*ended, *ended, *list(self.model.deleted)[-3:], NEVER]
        self.ask(by, name, choice[pick % len(choice)], cursor)

    def note(self, by: int, pick: int, metadata: dict[str, str | None]) -> None:
        self.ask(by, "update_metadata", self.some(pick, lambda s: s.metadata), metadata)

    def claim(self, by: int, pick: int, expected: Any) -> None:
        session_id = self.some(pick, self.claimable)
        wanted: list[Lease] = []

        def expect(_: Any) -> Lease:
            lease = self.model.claim(self.workers[by], session_id, ttl=LONG, expected=expected)
            wanted.append(lease)
            return lease

        claim = self.stores[by].claim
        lease = self.compare(
            "claim", lambda: claim(session_id, ttl=LONG, expected=expected), expect
        )
        if lease is not None:
            self.leases.append((by, lease, wanted[0]))

    def use_lease(self, pick: int, name: str, status: str, error: str | None) -> None:
        if not self.leases:
            return
        chosen = self.leases[-4:]
        if pick % 2:
            chosen = [one for one in self.leases if self.is_taken_away(one[2])] or chosen
        by, lease, wanted = chosen[pick % len(chosen)]
        worker = self.workers[by]
        if name == "release":
            self.compare(
                name,
                lambda: lease.release(status),
                lambda _: self.model.release(worker, wanted, status),
            )
        elif name == "leave":
            told = (ValueError, ValueError("boom"), None) if error else (None, None, None)
            self.compare(
                name,
                lambda: lease.__exit__(*told),
                lambda _: self.model.leave(worker, wanted, error),
            )
        else:
            own = getattr(self.model, name)
            self.compare(name, getattr(lease, name), lambda _: own(worker, wanted))
        assert (lease.lost, lease.released) == (wanted.lost is not None, wanted.released)

    def lose_lease(self, pick: int, marked: float | None) -> None:
        """Let a lease have expired, and a reaper have seen that."""
        held = [s for s in self.model.sessions.values() if s.owner is not None]
        if held:
            session = held[pick % len(held)]
            expire_lease(self.world, session.id, seconds_ago=200 + pick)
            expires = self.world.redis.hget(self.world.session(session.id), "lease_expires_at")
            session.expires_ms = microseconds(str(expires)) // 1000
            if marked is not None:
                mark(self.world, session.id, marked)
                seen = self.world.redis.hget(self.world.session(session.id), "reap_seen_ms")
                session.marked_ms = int(str(seen))

    def grow_old(self, pick: int, ended: bool) -> None:
        """Let a session have been idle, or have ended, long ago."""
        fitting = [s for s in self.model.sessions.values() if s.ended == ended]
        if not fitting:
            return
        session = fitting[pick % len(fitting)]
        us = server_now(self.world) - int(OLD * 1e6) - pick * 1000
        score = {session.id: us}
        if ended:
            session.ended_us = us
            self.world.redis.zadd(f"{session.partition}ended", score, xx=True)
            return
        session.created_us = session.last_us = us
        times = dict.fromkeys(("created_at", "last_activity"), iso(us))
        self.world.redis.hset(self.world.session(session.id), mapping=times)
        for index in ("sessions", "activity"):
            self.world.redis.zadd(f"{session.partition}{index}", score, xx=True)

    def reap(
        self,
        by: int,
        idle_for: float | None,
        ended_for: float | None,
        limit: int,
        dry_run: bool,
    ) -> None:
        self.ask(by, "reap", idle_for=idle_for, ended_for=ended_for, limit=limit, dry_run=dry_run)

    def ask_wrongly(self, by: int, wrong: tuple[str, tuple[Any, ...], dict[str, Any]]) -> None:
        name, args, options = wrong

        def expect(_: Any) -> None:
            raise RefusedError("INVALID_ARGUMENT")

        self.compare(
            "bad argument", lambda: getattr(self.stores[by], name)(*args, **options), expect
        )

    def batch(self, by: int, data: list[tuple[int, int, str, list[str]]]) -> None:
        """Several at once; what was noted carries the fence of that moment."""
        worker = self.workers[by]
        noted: list[tuple[str, tuple[Any, ...], dict[str, Any], Lease | None]] = []
        for which, pick, status, chunks in data:
            one = self.some(pick, lambda s: s.id in worker.held)
            drawn: tuple[tuple[str, tuple[Any, ...]], ...] = (
                ("add_output", (one, *chunks)),
                ("add_error", (one, *chunks)),
                ("update_status", (one, status)),
                ("update_activity", (one,)),
                ("update_metadata", (one, {"branch": chunks[0]})),
                ("delete_session", (one,)),
                ("get_session", (one,)),
                ("read_output", (one,)),
                ("get_metrics", ()),
            )
            name, args = drawn[which]
            noted.append((name, args, {}, worker.held.get(one) if name in FENCED else None))
        outcomes = self.sent(by, noted)
        self.model.now_us = time.time() * 1e6
        wanted = []
        for name, args, options, lease in noted:
            own = options | ({"noted": lease} if name in FENCED else {})
            wanted.append(
                self.ask_model(
                    lambda _, n=name, a=args, o=own: getattr(self.model, n)(worker, *a, **o), None
                )
            )
        after = self.look()
        for (name, *_), outcome, expectation in zip(noted, outcomes, wanted, strict=True):
            answer = (None, outcome.error) if outcome.error else (outcome.result(), None)
            self.judge(name, answer, expectation, after, in_batch=True)
            self.count("batch", "refused" if outcome.error else "done")
        self.finish(after)

    def sent(self, by: int, noted: list[Any]) -> list[Any]:
        store = self.stores[by]
        if not isinstance(store, Awaiting):
            with store.batch() as batch:
                for name, args, options, _ in noted:
                    getattr(batch, name)(*args, **options)
            return list(batch)
        own = store.store
        assert isinstance(own, AsyncSessionStore)

        async def send() -> list[Any]:
            async with own.batch() as batch:
                for name, args, options, _ in noted:
                    getattr(batch, name)(*args, **options)
            return list(batch)

        runner: asyncio.Runner = store._runner
        return runner.run(send())

    # ---- The end -----------------------------------------------------------------------------

    def teardown(self) -> None:
        told: dict[str, list[dict[str, str]]] = {}
        for one in self.world.events():
            told.setdefault(one["session_id"], []).append(one)
        assert told == self.model.events
        assert_consistent(self.world)
        for store in self.stores:
            assert [one for one in store.check() if not one.warning] == []
        for _, lease, _ in self.leases:
            lease.abandon()


#: One partition on each target, and sixteen on the first real server. fakeredis takes twice as
#: long for each step.
REAL = proves("model", ordinary=360, full=30_000)
FAKE = proves("model", ordinary=120, full=10_000)
WORLDS = [
    *(pytest.param(target, 1, id=target, marks=REAL) for target in SERVERS),
    pytest.param(FAKEREDIS, 1, id=FAKEREDIS, marks=FAKE),
    pytest.param(SERVERS[0], 16, id=f"{SERVERS[0]}-16", marks=REAL),
]


#: Ten runs. After ten, Hypothesis begins to repeat parts of those it has had, and what comes up
#: is the same few operations.
ROUND = hypothesis.settings(
    max_examples=10,
    stateful_step_count=STEPS_A_RUN,
    deadline=None,
    database=None,
    print_blob=False,
    phases=(hypothesis.Phase.generate, hypothesis.Phase.shrink),
    suppress_health_check=list(hypothesis.HealthCheck),
)


def is_rare(bench: Bench, size: int) -> bool:
    """Whether something has not yet come up 35 times: on three servers, 100 times in all."""
    return bench.steps < 2 * size and min(bench.seen[pair] for pair in SEEN) < 35


@pytest.mark.parametrize(("target", "partitions"), WORLDS)
def test_both_stores_answer_as_the_model_does(
    target: str,
    partitions: int,
    running: Callable[[str], PrivateServer],
    pytestconfig: pytest.Config,
    attack: Attack,
) -> None:
    seed = int(os.environ.get(SEED) or crc32(attack.test.encode()))
    as_found = pytestconfig.getoption("model_as_found")
    phases = ROUND.phases[:1] if as_found else ROUND.phases
    url = None if target == FAKEREDIS else running(target).url
    bench = Bench(target, url, partitions, checked=1 if attack.in_full else CHECKED)
    machine: Any = type("OneMachine", (Machine,), {"bench": bench})
    began = time.monotonic()
    try:
        while bench.steps < attack.size or (attack.in_full and is_rare(bench, attack.size)):
            print(f"{SEED}={seed} replays what follows")
            left = -(-(attack.size - bench.steps) // STEPS_A_RUN)
            runs = min(ROUND.max_examples, left) if left > 0 else ROUND.max_examples
            settings = hypothesis.settings(ROUND, max_examples=runs, phases=phases)
            run_state_machine_as_test(hypothesis.seed(seed)(machine), settings=settings)
            seed += 1
    finally:
        bench.close()
    print(f"{bench.steps} steps in {time.monotonic() - began:.1f} s")
    outcomes = {f"{name}: {outcome}": times for (name, outcome), times in bench.seen.items()}
    for outcome, times in sorted(outcomes.items()):
        print(f"{times:7} {outcome}")
    rare: dict[tuple[str, str], int] = {}
    for pair, least in SEEN.items():
        demanded = int(least * bench.steps / 1000)
        if bench.seen[pair] < demanded and demanded >= FEWEST_DEMANDED:
            rare[pair] = bench.seen[pair]
    assert not rare, f"seen too rarely in {bench.steps} steps: {rare}; {SEED}={seed}"
    demanded_of = {f"{name}: {outcome}" for name, outcome in SEEN}
    attack.tell(
        injected=bench.steps,
        wrong=0,  # the first divergence has raised
        outcomes={one: times for one, times in outcomes.items() if one in demanded_of},
    )
