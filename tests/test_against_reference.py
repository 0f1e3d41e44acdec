"""The store beside the original: the same random operations, compared answer by answer.

Ids are told apart by the order of creation; times are compared only by what their order says.
The seed is fixed for each world; ``SESSIONSTORE_TEST_SEED`` sets another, and a failure names it.
"""

from __future__ import annotations

import os
import random
from collections import Counter
from collections.abc import Iterator
from datetime import datetime
from typing import Any, NamedTuple
from zlib import crc32

import pytest
import reference
from consistency import assert_consistent

import sessionstore
from sessionstore.models import STATUSES

SEED = "SESSIONSTORE_TEST_SEED"
OPERATIONS = {"fakeredis": 800}
DEFAULT_OPERATIONS = 3000
MOST_SESSIONS = 25

#: How often each outcome of each operation must be seen, in a hundred thousand operations. A run
#: that hardly deletes, or hardly ever misses, proves little.
SEEN = {
    ("create_session", "session"): 3000,
    ("get_session", "session"): 2000,
    ("get_session", "not found"): 400,
    ("find_session", "session"): 2000,
    ("find_session", "none"): 400,
    ("find_session_by_service_id", "session"): 2000,
    ("find_session_by_service_id", "none"): 400,
    ("update_status", "none"): 2000,
    ("update_status", "not found"): 400,
    ("update_activity", "none"): 2000,
    ("update_activity", "not found"): 400,
    ("add_output", "none"): 2000,
    ("add_output", "not found"): 400,
    ("add_error", "none"): 2000,
    ("add_error", "not found"): 400,
    ("delete_session", "true"): 2000,
    ("delete_session", "false"): 400,
    ("get_all_sessions", "sessions"): 2000,
    ("get_sessions_by_type", "sessions"): 2000,
    ("get_sessions_by_type", "empty"): 400,
    ("get_metrics", "metrics"): 2000,
}

# Created twice as often as deleted, up to MOST_SESSIONS.
DRAWN = [*sorted({name for name, _ in SEEN}), "create_session"]

FIELDS = ("type", "service_session_id", "status", "project_path", "task_id", "mcp_session_id")
COUNTS = ("total_sessions", "active_sessions", "busy_sessions", "error_sessions",
          "sessions_by_type")  # fmt: skip
NO_SUCH = "agent_claude_00000000-0000-4000-8000-000000000000"


class Side:
    """One of the two stores, its answers in terms both share."""

    def __init__(self, store: Any) -> None:
        self.store = store
        self.ids: list[str] = []

    def ask(self, operation: str, arguments: tuple[Any, ...]) -> tuple[str, Any]:
        """The kind of outcome, and the answer without ids and times."""
        try:
            answer = getattr(self.store, operation)(*arguments)
        except (sessionstore.SessionNotFoundError, reference.SessionNotFoundError):
            return "not found", None
        if operation == "create_session":
            self.ids.append(answer.id)
        if operation in ("add_output", "add_error"):
            return "none", None  # the total that ours returns is for the contract to test
        if answer is None:
            return "none", None
        if isinstance(answer, bool):
            return str(answer).lower(), None
        if isinstance(answer, list):
            return "sessions" if answer else "empty", [self.plain(s) for s in answer]
        if hasattr(answer, "total_sessions"):
            return "metrics", [getattr(answer, name) for name in COUNTS]
        return "session", self.plain(answer)

    def plain(self, session: Any) -> dict[str, Any]:
        created, last = _time(session.created_at), _time(session.last_activity)
        assert created <= last
        return {name: getattr(session, name) for name in FIELDS} | {
            "number": self.ids.index(session.id),
            "output_buffer": list(session.output_buffer),
            "error_buffer": list(session.error_buffer),
        }

    def by_activity(self) -> list[int]:
        """All sessions, the least recently active first."""
        sessions = sorted(self.store.get_all_sessions(), key=lambda s: _time(s.last_activity))
        return [self.ids.index(session.id) for session in sessions]


def _time(value: datetime | str) -> datetime:
    return datetime.fromisoformat(value) if isinstance(value, str) else value


TAKES_ID = {
    "get_session",
    "find_session",
    "update_status",
    "update_activity",
    "add_output",
    "add_error",
    "delete_session",
}


class Step(NamedTuple):
    """One operation, and what both sides answered."""

    operation: str
    further: tuple[Any, ...]
    ours: tuple[str, Any]
    original: tuple[str, Any]


class Operations:
    """Random operations on sessions that are named by their number of creation."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.created = 0
        self.kept: list[int] = []

    def __call__(self) -> tuple[str, Any, tuple[Any, ...]]:
        """An operation, the number of its session if it has one, its further arguments."""
        rng = self.rng
        operation = rng.choice(DRAWN)
        if operation == "create_session" and len(self.kept) < MOST_SESSIONS:
            self.kept.append(self.created)
            self.created += 1
            optional = (rng.choice([None, "task-1", "task-2"]), rng.choice([None, "mcp-1"]))
            kind = rng.choice(["claude", "codex", "gemini"])
            path = rng.choice(["/", "/é"])
            return operation, None, (kind, self._service(), path, *optional[: rng.randrange(3)])
        if operation in ("create_session", "delete_session"):
            number = self._number()
            if number in self.kept:
                self.kept.remove(number)
            return "delete_session", number, ()
        if operation == "find_session_by_service_id":
            return operation, None, (self._service(),)
        if operation == "get_sessions_by_type":
            return operation, None, (rng.choice(["claude", "codex", "gemini", "gemini-2"]),)
        if operation in ("get_all_sessions", "get_metrics"):
            return operation, None, ()
        further: dict[str, tuple[str, ...]] = {
            "update_status": (rng.choice(STATUSES),),
            "add_output": (rng.choice(["", "line", "a\nb", "漢字 😀", "\x00"]),),
            "add_error": (rng.choice(["", "error", "\x1b[31m"]),),
        }
        return operation, self._number(), further.get(operation, ())

    def _service(self) -> str:
        return f"service-{self.rng.randrange(20)}"

    def _number(self) -> int | None:
        """Mostly a session that is there; else one deleted, or one that never was."""
        chance = self.rng.random()
        if self.kept and chance < 0.75:
            return self.rng.choice(self.kept)
        return self.rng.randrange(self.created) if self.created and chance < 0.95 else None


def drive(ours: Side, original: Side, seed: int, operations: int) -> Iterator[Step]:
    """Ask both sides the same, one operation after another."""
    draw = Operations(seed)
    for _ in range(operations):
        operation, number, further = draw()

        answers = []
        for side in (ours, original):
            session_id = NO_SUCH if number is None else side.ids[number]
            own = (session_id, *further) if operation in TAKES_ID else further
            answers.append(side.ask(operation, own))
        yield Step(operation, further, *answers)


def test_the_store_answers_as_the_original_does(world: Any) -> None:
    seed = int(
        os.environ.get(SEED) or crc32(f"{world.style}-{world.target}-{world.partitions}".encode())
    )
    replay = f"{SEED}={seed} replays this"
    ours, original = Side(world.store()), Side(reference.SessionStore())
    wanted = OPERATIONS.get(world.target, DEFAULT_OPERATIONS)
    if world.partitions > 1:
        wanted //= 2
    seen = Counter[tuple[str, str]]()
    for step in drive(ours, original, seed, wanted):
        seen[step.operation, step.original[0]] += 1
        assert step.ours == step.original, f"{step.operation} {step.further}; {replay}"
    assert ours.by_activity() == original.by_activity(), replay
    assert_consistent(world)

    rare = {pair: seen[pair] for pair, n in SEEN.items() if seen[pair] * 100_000 < n * wanted}
    assert not rare, f"seen too rarely: {rare}; {replay}"


class _Forgetful(reference.SessionStore):
    """The original with one mistake: adding an error is no activity."""

    def add_error(self, session_id: str, error: str) -> None:
        before = self.get_session(session_id).last_activity
        super().add_error(session_id, error)
        self.get_session(session_id).last_activity = before


class _LatestByService(reference.SessionStore):
    """The original with one mistake: the latest session of a service session is found."""

    def find_session_by_service_id(self, service_session_id: str) -> Any:
        found = [s for s in self.sessions.values() if s.service_session_id == service_session_id]
        return found[-1] if found else None


class _Sticky(reference.SessionStore):
    """The original with one mistake: deleting an ended session does nothing."""

    def delete_session(self, session_id: str) -> bool:
        session = self.sessions.get(session_id)
        return session is not None and (
            session.status == "terminated" or super().delete_session(session_id)
        )


@pytest.mark.parametrize("mutant", [_Forgetful, _LatestByService, _Sticky])
def test_a_store_with_one_mistake_is_told_from_the_original(
    mutant: type[reference.SessionStore],
) -> None:
    """The control: the comparison sees what it should see."""
    ours, original = Side(mutant()), Side(reference.SessionStore())
    differs = any(step.ours != step.original for step in drive(ours, original, 7, 2000))
    assert differs or ours.by_activity() != original.by_activity()
