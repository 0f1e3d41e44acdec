"""Damage on purpose: one fault of each kind that the doctor must find, in a session that is there.

Done with plain redis-py and nothing of the library. A fault that concerns a hash is done by a
script that first looks whether the hash is there: workers may be deleting it, and a fault must not
leave a stub that nothing can mend.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

from consistency import ENDED, INDEXED
from rawkeys import RawKeys

GUARDED = """
if redis.call('TYPE', KEYS[1]).ok == 'hash' then
  return redis.call(unpack(ARGV))
end
return false
"""
LATER = "2999-01-01T00:00:00.000000Z"
EARLIER = "2001-01-01T00:00:00.000000Z"


class Patient:
    """A session to be damaged, as plain redis-py sees it."""

    def __init__(self, raw: RawKeys, session_id: str, rng: random.Random) -> None:
        self.raw, self.id, self.rng = raw, session_id, rng
        self.redis: Any = raw.redis
        self.prefix = raw.prefix_of(session_id)
        self.key = raw.session(session_id)
        self.fields: dict[str, str] = self.redis.hgetall(self.key)

    @property
    def ended(self) -> bool:
        return self.fields["status"] in ENDED

    @property
    def ghost(self) -> str:
        """An id that no session has, in the same partition."""
        digits = self.id.rpartition("_")[2][:2]
        return f"agent_claude_{digits}{str(uuid4())[2:]}"

    def change(self, *command: object) -> None:
        """A command on a key of the session's, if the session is there."""
        self.redis.eval(GUARDED, 1, self.key, *command)

    def set_fields(self, **fields: object) -> None:
        self.change("HSET", self.key, *(part for pair in fields.items() for part in pair))

    def lose_field(self, name: str) -> None:
        self.change("HDEL", self.key, name)

    def set_of(self, field: str) -> str:
        return f"{self.prefix}sessions:{INDEXED[field]}:{self.fields[field]}"

    def any_set(self) -> str:
        return self.set_of(self.rng.choice([field for field in INDEXED if field in self.fields]))

    def by_time(self) -> str:
        return self.prefix + ("ended" if self.ended else "activity")

    def other_status(self) -> str:
        statuses = {"starting", "active", "busy", "error", "terminated"} - {self.fields["status"]}
        return self.rng.choice(sorted(statuses))

    def spoil(self, key: str) -> None:
        """Put a key of another type in its place."""
        self.redis.unlink(key)
        self.redis.set(key, "spoilt")


@dataclass(frozen=True)
class Fault:
    """What is done to a session, and as which kinds the doctor may tell it, the first for sure.

    ``to_all``: other sessions lose something too. ``loses``: the session itself is gone.
    """

    do: Callable[[Patient], object]
    kinds: tuple[str, ...]
    to_all: bool = False
    loses: bool = False
    needs: Callable[[Patient], bool] = lambda _: True


def _any_list(one: Patient) -> str:
    return one.key + one.rng.choice([":output", ":errors"])


def _in_other_set(one: Patient) -> None:
    index = one.rng.choice([f"status:{one.other_status()}", "task:other", "mcp:other", "owner:x"])
    one.change("SADD", f"{one.prefix}sessions:{index}", one.id)


def _ghost_in_set(one: Patient) -> None:
    one.redis.sadd(one.any_set(), one.ghost)


def _ghost_in_order(one: Patient) -> None:
    name = one.rng.choice(["sessions", "activity", "ended", "leases"])
    one.redis.zadd(one.prefix + name, {one.ghost: one.rng.randrange(1 << 50)})


def _without_hash(one: Patient) -> None:
    one.redis.rpush(f"{one.prefix}session:{one.ghost}:output", "left", "over")


def _unknown_type(one: Patient) -> None:
    one.redis.sadd(f"{one.prefix}types", f"gone{one.rng.randrange(100)}")


def _expire(one: Patient, key: str) -> None:
    assert one.redis.exists(key)
    one.redis.expire(key, 1000)


def _lane(one: Patient) -> None:
    one.redis.set(f"{one.prefix}lane:{uuid4().hex}-0", "1 ok")


def is_held(one: Patient) -> bool:
    return "owner" in one.fields


def is_free(one: Patient) -> bool:
    return "owner" not in one.fields


def is_live(one: Patient) -> bool:
    return not one.ended


def has_output(one: Patient) -> bool:
    return bool(one.redis.llen(f"{one.key}:output") and one.redis.llen(f"{one.key}:errors"))


_LEFT_OVER = ("index_orphan", "buffer_orphan", "drift")

FAULTS: dict[str, Fault] = {
    # Index sets
    "missing in a set": Fault(
        lambda one: one.redis.srem(one.any_set(), one.id), ("index_missing", "drift")
    ),
    "in a set too many": Fault(_in_other_set, ("index_stray", "drift")),
    "a ghost in a set": Fault(_ghost_in_set, ("index_orphan", "drift")),
    "a set lost": Fault(
        lambda one: one.redis.unlink(one.set_of("status")), ("index_missing", "drift"), to_all=True
    ),
    "a type's set lost": Fault(
        lambda one: one.redis.unlink(one.set_of("type")), ("index_missing", "drift"), to_all=True
    ),
    "a ghost alone in a set": Fault(
        lambda one: one.redis.sadd(f"{one.prefix}sessions:service:{uuid4()}", one.ghost),
        ("index_orphan",),
    ),
    "an id that would name a buffer": Fault(
        lambda one: one.redis.sadd(one.set_of("type"), f"{one.id}:output"),
        ("index_orphan", "drift"),
    ),
    "bytes that are not UTF-8 in a set": Fault(
        lambda one: one.redis.sadd(one.set_of("type"), b"\xff\xfe\0%41 \x1b[2J"),
        ("index_orphan", "drift"),
    ),
    "a type lost": Fault(
        lambda one: one.redis.srem(f"{one.prefix}types", one.fields["type"]),
        ("index_missing", "drift"),
        to_all=True,
    ),
    "a type too many": Fault(_unknown_type, ("index_orphan",)),
    # Sorted sets
    "missing in the order": Fault(
        lambda one: one.redis.zrem(f"{one.prefix}sessions", one.id), ("index_missing", "drift")
    ),
    "missing by time": Fault(
        lambda one: one.redis.zrem(one.by_time(), one.id), ("index_missing", "drift")
    ),
    "a ghost in an order": Fault(_ghost_in_order, ("index_orphan", "drift")),
    "the place in the order": Fault(
        lambda one: one.redis.zadd(f"{one.prefix}sessions", {one.id: 5}, xx=True), ("index_score",)
    ),
    "the time of activity": Fault(
        lambda one: one.redis.zadd(f"{one.prefix}activity", {one.id: 5}, xx=True),
        ("index_score",),
        needs=is_live,
    ),
    "live and ended": Fault(
        lambda one: one.change(
            "ZADD", one.prefix + ("activity" if one.ended else "ended"), 5, one.id
        ),
        ("index_stray", "drift"),
    ),
    "a sorted set lost": Fault(
        lambda one: one.redis.unlink(one.by_time()), ("index_missing", "drift"), to_all=True
    ),
    # Leases
    "a lease that is not there": Fault(
        lambda one: one.change("ZADD", f"{one.prefix}leases", 5, one.id),
        ("index_stray",),
        needs=is_free,
    ),
    "a lease without its entry": Fault(
        lambda one: one.redis.zrem(f"{one.prefix}leases", one.id), ("index_missing",), needs=is_held
    ),
    "an entry that expires later": Fault(
        lambda one: one.redis.zadd(f"{one.prefix}leases", {one.id: 9e14}, xx=True),
        ("index_score",),
        needs=is_held,
    ),
    "a lease without an expiry": Fault(
        lambda one: one.lose_field("lease_expires_at"), ("lease_torn",), needs=is_held
    ),
    "a lease without a fence": Fault(
        lambda one: one.lose_field("fence"), ("lease_torn",), needs=is_held
    ),
    "a lease without an owner": Fault(
        lambda one: one.lose_field("owner"), ("lease_torn", "index_stray"), needs=is_held
    ),
    "held and active": Fault(
        lambda one: one.set_fields(status="active"),
        ("lease_torn", "index_missing", "index_stray", "drift"),
        needs=is_held,
    ),
    "held and ended": Fault(
        lambda one: one.set_fields(status="error"),
        ("lease_torn", "index_missing", "index_stray", "drift"),
        needs=is_held,
    ),
    "a mark without a lease": Fault(
        lambda one: one.set_fields(reap_seen_ms="5"), ("lease_torn",), needs=is_free
    ),
    # Buffers
    "a buffer without a session": Fault(_without_hash, ("buffer_orphan",)),
    "a total too small": Fault(
        lambda one: one.set_fields(output_total=0), ("buffer_total",), needs=has_output
    ),
    "a total that is no number": Fault(
        lambda one: one.set_fields(error_total="many"), ("buffer_total",)
    ),
    "wrong bytes": Fault(lambda one: one.set_fields(output_bytes=7), ("buffer_bytes",)),
    "bytes that are no number": Fault(
        lambda one: one.set_fields(error_bytes="-"), ("buffer_bytes",)
    ),
    "an entry from nowhere": Fault(
        lambda one: one.change("RPUSH", _any_list(one), "from nowhere"),
        ("buffer_bytes", "buffer_total"),
    ),
    "a buffer lost": Fault(
        lambda one: one.redis.unlink(f"{one.key}:output"), ("buffer_bytes",), needs=has_output
    ),
    # Types of keys
    "a set of the wrong type": Fault(
        lambda one: one.spoil(one.set_of("status")), ("wrong_type", "drift"), to_all=True
    ),
    "a sorted set of the wrong type": Fault(
        lambda one: one.spoil(one.prefix + one.rng.choice(["sessions", "leases"])),
        ("wrong_type", "drift"),
        to_all=True,
    ),
    "types of the wrong type": Fault(
        lambda one: one.spoil(f"{one.prefix}types"), ("wrong_type", "drift"), to_all=True
    ),
    "events of the wrong type": Fault(
        lambda one: one.spoil(f"{one.prefix}events"), ("wrong_type",), to_all=True
    ),
    "a buffer of the wrong type": Fault(
        lambda one: one.spoil(f"{one.key}:output"), ("wrong_type", "buffer_bytes")
    ),
    "a set of nobody of the wrong type": Fault(
        lambda one: one.redis.set(f"{one.prefix}sessions:mcp:{uuid4()}", "spoilt"), ("wrong_type",)
    ),
    "a session of the wrong type": Fault(
        lambda one: one.spoil(one.key), ("wrong_type", *_LEFT_OVER), loses=True
    ),
    "a session lost": Fault(lambda one: one.redis.unlink(one.key), _LEFT_OVER, loses=True),
    # Expiry
    "a session that expires": Fault(lambda one: _expire(one, one.key), ("expiry",)),
    "an index that expires": Fault(lambda one: _expire(one, one.any_set()), ("expiry",)),
    "the order expires": Fault(lambda one: _expire(one, f"{one.prefix}sessions"), ("expiry",)),
    "the layout expires": Fault(lambda one: _expire(one, one.raw.meta), ("expiry",)),
    "a buffer that expires": Fault(
        lambda one: _expire(one, f"{one.key}:output"), ("expiry",), needs=has_output
    ),
    "a lane that lasts": Fault(_lane, ("lane_lasting",)),
    # Fields
    "another id": Fault(lambda one: one.set_fields(id="somebody"), ("field_restored",)),
    "no type": Fault(lambda one: one.lose_field("type"), ("field_restored",)),
    "no status": Fault(lambda one: one.lose_field("status"), ("field_restored",)),
    "a status that is none": Fault(
        lambda one: one.set_fields(status="asleep"), ("field_restored",)
    ),
    "a creation that is no time": Fault(
        lambda one: one.set_fields(created_at="yesterday"), ("field_restored",)
    ),
    "no last activity": Fault(
        lambda one: one.lose_field("last_activity"), ("field_restored", "index_score")
    ),
    "active before it was created": Fault(
        lambda one: one.set_fields(last_activity=EARLIER), ("field_restored", "index_score")
    ),
    "another time of creation": Fault(
        lambda one: one.set_fields(created_at=EARLIER), ("index_score",)
    ),
}  # fmt: skip
