"""What the keys of a namespace must be, recomputed from the sessions' hashes.

Done with plain redis-py and nothing of the library, so that both cannot be wrong in the same way.
"""

from __future__ import annotations

import re
from collections import defaultdict
from datetime import UTC, datetime, timedelta
from typing import Any

import redis
from rawkeys import RawKeys

ENDED = {"terminated", "error"}
ENTRY_OVERHEAD = 16  # bytes
INDEXED = {
    "type": "type",
    "status": "status",
    "service_session_id": "service",
    "task_id": "task",
    "mcp_session_id": "mcp",
    "owner": "owner",
}


def microseconds(stored: str) -> int:
    """A stored time as microseconds since 1970."""
    since = datetime.fromisoformat(stored) - datetime(1970, 1, 1, tzinfo=UTC)
    return since // timedelta(microseconds=1)


def sessions_of(world: Any) -> dict[str, dict[str, str]]:
    """Every session's hash by id, over all partitions."""
    raw = _raw(world)
    found: dict[str, dict[str, str]] = {}
    for prefix, keys in raw.by_partition().items():
        of_partition = _sessions(raw.redis, prefix, keys)
        assert not found.keys() & of_partition.keys(), "a session is in two partitions"
        found |= of_partition
    return found


def _raw(world: Any) -> RawKeys:
    """Some tests have namespaces of their own, of one partition."""
    return world if isinstance(world, RawKeys) else RawKeys(world.redis, world.name)


def _sessions(client: redis.Redis, prefix: str, keys: set[str]) -> dict[str, dict[str, str]]:
    ids = [key.split(":")[1] for key in keys if re.fullmatch("session:[^:]*", key)]
    with client.pipeline(transaction=False) as pipe:
        for session_id in ids:
            pipe.hgetall(f"{prefix}session:{session_id}")
        return dict(zip(ids, pipe.execute(), strict=True))


def assert_consistent(world: Any) -> None:
    """Index sets, sorted sets, byte counts and keys are exactly those the hashes call for."""
    raw = _raw(world)
    keys = raw.by_partition()
    layout = keys[raw.meta.removesuffix("meta")]
    assert "meta" in layout
    assert raw.redis.ttl(raw.meta) == -1
    layout.remove("meta")
    for prefix, of_partition in keys.items():
        sessions = _sessions(raw.redis, prefix, of_partition)
        for session_id, fields in sessions.items():
            assert raw.prefix_of(session_id) == prefix
            assert raw.prefix_for(fields["service_session_id"]) == prefix
        _assert_partition_consistent(raw.redis, prefix, of_partition, sessions)


def _assert_partition_consistent(
    client: redis.Redis, prefix: str, keys: set[str], sessions: dict[str, dict[str, str]]
) -> None:
    expected_sets: dict[str, set[str]] = defaultdict(set)
    for session_id, fields in sessions.items():
        assert fields["id"] == session_id
        for field, index in INDEXED.items():
            if field in fields:
                expected_sets[f"sessions:{index}:{fields[field]}"].add(session_id)
    found_sets = {key: client.smembers(prefix + key) for key in keys if key.startswith("sessions:")}
    assert found_sets == expected_sets
    types = {fields["type"] for fields in sessions.values()}
    assert client.smembers(f"{prefix}types") == types

    live = {i: f for i, f in sessions.items() if f["status"] not in ENDED}
    assert dict(client.zrange(f"{prefix}sessions", 0, -1, withscores=True)) == {
        session_id: microseconds(fields["created_at"]) for session_id, fields in sessions.items()
    }
    assert dict(client.zrange(f"{prefix}activity", 0, -1, withscores=True)) == {
        session_id: microseconds(fields["last_activity"]) for session_id, fields in live.items()
    }
    assert set(client.zrange(f"{prefix}ended", 0, -1)) == set(sessions) - set(live)
    _assert_leases_consistent(client, prefix, sessions)

    buffers = set()
    for session_id, fields in sessions.items():
        for name, field in (("output", "output"), ("errors", "error")):
            key = f"session:{session_id}:{name}"
            entries = client.lrange(prefix + key, 0, -1)
            held = sum(len(entry.encode()) + ENTRY_OVERHEAD for entry in entries)
            assert int(fields.get(f"{field}_bytes", 0)) == held
            assert int(fields.get(f"{field}_total", 0)) >= len(entries)
            if entries:
                buffers.add(key)

    allowed = {"events", "types", "sessions", "activity", "ended", "leases", "reaping"}
    allowed |= buffers | set(expected_sets) | {f"session:{session_id}" for session_id in sessions}
    assert {key for key in keys if not key.startswith("lane:")} <= allowed
    with client.pipeline(transaction=False) as pipe:
        for key in keys:
            pipe.ttl(prefix + key)
        for key, ttl in zip(keys, pipe.execute(), strict=True):
            assert (ttl > 0) == key.startswith("lane:"), f"{key}: expires in {ttl} s"


def _assert_leases_consistent(
    client: redis.Redis, prefix: str, sessions: dict[str, dict[str, str]]
) -> None:
    """An owner, an expiry, and an entry with the same expiry go together; owners' sets are above.

    The fence outlives its lease. A mark of the reaper's does not.
    """
    held = {session_id: fields for session_id, fields in sessions.items() if "owner" in fields}
    assert dict(client.zrange(f"{prefix}leases", 0, -1, withscores=True)) == {
        session_id: microseconds(fields["lease_expires_at"]) / 1000
        for session_id, fields in held.items()
    }
    for session_id, fields in sessions.items():
        if session_id in held:
            assert fields["status"] == "busy"
            assert fields["fence"].isdecimal()
        else:
            assert fields.keys().isdisjoint({"lease_expires_at", "reap_seen_ms"})


def expected_metrics(world: Any) -> dict[str, Any]:
    """What ``get_metrics`` must answer, counted one by one."""
    sessions = sessions_of(world).values()
    by_status = dict.fromkeys(("starting", "active", "busy", "error", "terminated"), 0)
    by_type: dict[str, int] = defaultdict(int)
    for fields in sessions:
        by_status[fields["status"]] += 1
        by_type[fields["type"]] += 1
    return {
        "total_sessions": len(sessions),
        "active_sessions": by_status["active"],
        "busy_sessions": by_status["busy"],
        "error_sessions": by_status["error"],
        "sessions_by_type": dict(by_type),
        "sessions_by_status": by_status,
    }
