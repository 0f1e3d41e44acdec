"""A namespace at a moment: what all of its keys hold; and sessions made older than they are.

Done with plain redis-py and nothing of the library. What is made older stays consistent: hash and
sorted set agree.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

from rawkeys import RawKeys

READ: dict[str, Callable[[Any, str], Any]] = {
    "string": lambda client, key: client.get(key),
    "hash": lambda client, key: client.hgetall(key),
    "list": lambda client, key: client.lrange(key, 0, -1),
    "set": lambda client, key: client.smembers(key),
    "zset": lambda client, key: client.zrange(key, 0, -1, withscores=True),
    "stream": lambda client, key: client.xrange(key),
}


def everything(world: RawKeys) -> dict[str, Any]:
    """Every key of the namespace with what it holds, apart from lanes."""
    client: Any = world.redis
    return {
        key: READ[client.type(key)](client, key)
        for key in sorted(client.scan_iter(world.pattern, count=1000))
        if ":lane:" not in key
    }


def now_us(world: RawKeys) -> int:
    """The server's time, in microseconds."""
    client: Any = world.redis
    seconds, microseconds = client.time()
    return int(seconds) * 1_000_000 + int(microseconds)


def iso(us: int) -> str:
    """A time as the hashes hold it."""
    moment = datetime(1970, 1, 1, tzinfo=UTC) + timedelta(microseconds=us)
    return moment.isoformat(timespec="microseconds").replace("+00:00", "Z")


def expire_lease(world: RawKeys, session_id: str, seconds_ago: float = 1.0) -> None:
    """Let a lease have expired so many seconds ago."""
    ms = now_us(world) // 1000 - round(seconds_ago * 1000)
    world.redis.hset(world.session(session_id), "lease_expires_at", iso(ms * 1000))
    world.redis.zadd(f"{world.prefix_of(session_id)}leases", {session_id: ms}, xx=True)


def mark(world: RawKeys, session_id: str, seconds_ago: float) -> None:
    """Let a reaper have marked a session so many seconds ago."""
    ms = now_us(world) // 1000 - round(seconds_ago * 1000)
    world.redis.hset(world.session(session_id), "reap_seen_ms", ms)


def be_idle(world: RawKeys, session_id: str, seconds: float) -> None:
    """Let a session's last activity be so long ago."""
    us = now_us(world) - round(seconds * 1_000_000)
    world.redis.hset(world.session(session_id), "last_activity", iso(us))
    world.redis.zadd(f"{world.prefix_of(session_id)}activity", {session_id: us}, xx=True)


def be_ended(world: RawKeys, session_id: str, seconds: float) -> None:
    """Let an ended session have ended so long ago."""
    us = now_us(world) - round(seconds * 1_000_000)
    world.redis.zadd(f"{world.prefix_of(session_id)}ended", {session_id: us}, xx=True)


def abandon(store: Any) -> None:
    """Let a store's worker be gone: it neither renews nor gives back what it holds."""
    getattr(store, "store", store)._leases.end_renewal()
