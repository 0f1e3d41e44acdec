"""Listings beside plain Python: a stock of sessions of every kind, and what must be found in it."""

from __future__ import annotations

import random
from collections.abc import Iterable
from typing import Any

from consistency import ENDED, sessions_of

from sessionstore import AgentSession

ORDERS = ("created", "-last_activity")


class Shelf:
    """The sessions of a world as plain Python sees them."""

    def __init__(self, world: Any, store: Any) -> None:
        self.store = store
        self.sessions = sessions_of(world)
        self.created = world.scores("sessions")
        self.active = world.scores("activity") | world.scores("ended")
        seconds, microseconds = world.redis.time()
        self.now_us = seconds * 1_000_000 + microseconds

    def find(self, order: str = "created", limit: int | None = None, **filters: Any) -> list[str]:
        """The ids that ``find_sessions`` must give."""
        found = [i for i, fields in self.sessions.items() if self._matches(i, fields, filters)]
        if order == "created":
            found.sort(key=lambda i: (self.created[i], i))
        else:
            found.sort(key=lambda i: (self.active[i], i), reverse=True)
        return found[:limit]

    def _matches(self, session_id: str, fields: dict[str, str], filters: dict[str, Any]) -> bool:
        for name, wanted in filters.items():
            if name == "idle_for":
                matches = self.now_us - self.active[session_id] >= wanted * 1_000_000
            elif name == "status" and not isinstance(wanted, str):
                matches = fields["status"] in wanted
            else:
                matches = fields.get(name) == wanted
            if not matches:
                return False
        return True


def ids(sessions: Iterable[AgentSession]) -> list[str]:
    return [session.id for session in sessions]


def backdate(world: Any, session_id: str, seconds: int) -> None:
    """Make a session's last activity older."""
    ended = world.redis.hget(world.session(session_id), "status") in ENDED
    key = f"{world.prefix_of(session_id)}{'ended' if ended else 'activity'}"
    world.redis.zincrby(key, -seconds * 1_000_000, session_id)


def own(world: Any, session_id: str, owner: str) -> None:
    """Give a session an owner, as a claim does."""
    world.redis.hset(world.session(session_id), "owner", owner)
    world.redis.sadd(f"{world.prefix_of(session_id)}sessions:owner:{owner}", session_id)


FILTERS: dict[str, Any] = {
    "type": "claude",
    "status": ("active", "error"),
    "task_id": "task-1",
    "mcp_session_id": "mcp-1",
    "service_session_id": "service-1",
    "owner": "worker-1",
    "idle_for": 1050,
}


def stock(world: Any, store: Any) -> None:
    """Sixty sessions of every kind, seeded."""
    rng = random.Random(5)
    for i in range(60):
        session = store.create_session(
            rng.choice(["claude", "claude", "codex"]),
            rng.choice(["service-1", f"service-{i}"]),
            "/src",
            rng.choice(["task-1", "task-1", "task-2", None]),
            rng.choice(["mcp-1", "mcp-1", "mcp-2", None]),
            status=rng.choice(["starting", "active", "active", "busy", "error", "terminated"]),
        )
        if rng.random() < 0.7:
            own(world, session.id, rng.choice(["worker-1", "worker-1", "worker-2"]))
        backdate(world, session.id, rng.choice([0, 1000, 1100, 1200]) + (i % 7))
