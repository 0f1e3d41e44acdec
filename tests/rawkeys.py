"""The keys of a namespace as anybody with redis-cli sees them, derived from the design alone.

Done with plain redis-py and nothing of the library, so that both cannot be wrong in the same way.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import redis


def crc16(text: str) -> int:
    """CRC-16/XMODEM bit by bit, as Redis Cluster's specification has it."""
    crc = 0
    for byte in text.encode():
        crc ^= byte << 8
        for _ in range(8):
            crc = (crc << 1) ^ 0x1021 if crc & 0x8000 else crc << 1
            crc &= 0xFFFF
    return crc


def plain_client(url: str, *, cluster: bool = False, of: Any = redis, **options: Any) -> Any:
    """A client of redis-py for a server, a cluster, or what the sentinels tell to be the primary.

    ``of`` may be ``redis.asyncio``.
    """
    if url.startswith("redis+sentinel://"):
        first, _, service = url.removeprefix("redis+sentinel://").rpartition("/")
        host, _, port = first.partition(",")[0].partition(":")
        asked: Any = redis.Sentinel([(host, int(port))])
        host, port = asked.discover_master(service)
        asked.sentinels[0].close()
        return of.Redis(host=host, port=port, **options)
    kind = of.RedisCluster if cluster else of.Redis
    return kind.from_url(url, **options)


class RawKeys:
    """A namespace of 1, 16 or 256 partitions.

    Args:
        client: one that answers in text.
        namespace: its name.
        partitions: how many.
    """

    def __init__(self, client: redis.Redis, namespace: str, partitions: int = 1) -> None:
        self.redis, self.namespace, self.partitions = client, namespace, partitions
        #: Of all keys in the namespace: `{name}:` or `{name/`.
        self.pattern = f"{{{namespace}[/}}]*"
        self.meta = f"{{{namespace}}}:meta"
        tags = {
            1: [""],
            16: [f"/{digit}{digit}" for digit in "0123456789abcdef"],
            256: [f"/{number:02x}" for number in range(256)],
        }[partitions]
        #: What the keys of each partition begin with.
        self.prefixes = [f"{{{namespace}{tag}}}:" for tag in tags]

    @property
    def prefix(self) -> str:
        """What all keys begin with, where there is one partition."""
        (prefix,) = self.prefixes
        return prefix

    def _holding(self, digits: str) -> str:
        first, second = digits
        tag = {1: "", 16: f"/{first}{first}", 256: f"/{first}{second}"}[self.partitions]
        return f"{{{self.namespace}{tag}}}:"

    def prefix_of(self, session_id: str) -> str:
        """Of the partition that a session is in: its UUID's first two digits tell."""
        return self._holding(session_id.rpartition("_")[2][:2])

    def prefix_for(self, service_session_id: str) -> str:
        """Of the partition that the sessions of a service session are in."""
        return self._holding(f"{crc16(service_session_id) & 0xFF:02x}")

    def session(self, session_id: str, part: str = "") -> str:
        """The key of a session's hash, or of its ``:output`` or ``:errors``."""
        return f"{self.prefix_of(session_id)}session:{session_id}{part}"

    def by_partition(self) -> dict[str, set[str]]:
        """The keys that are there, by prefix and without it.

        A key of no partition fails here. With several partitions, ``meta`` has a prefix of its own.
        """
        known = {*self.prefixes, self.meta.removesuffix("meta")}
        found: dict[str, set[str]] = defaultdict(set)
        for key in self.redis.scan_iter(self.pattern, count=1000):
            split = re.fullmatch(r"(\{[^}]*\}:)(.*)", key, re.DOTALL)
            assert split is not None, f"{key!r} is in no partition"
            assert split[1] in known, f"{key!r} is in no partition"
            found[split[1]].add(split[2])
        return found

    def keys(self) -> set[str]:
        """The keys that are there, without prefixes."""
        return set().union(*self.by_partition().values())

    def scores(self, name: str) -> dict[str, float]:
        """A sorted set, over all partitions."""
        found: dict[str, float] = {}
        for part in self._of_each(lambda pipe, key: pipe.zrange(key, 0, -1, withscores=True), name):
            found.update(part)
        return found

    def members(self, name: str) -> set[str]:
        """A set, over all partitions."""
        return set().union(*self._of_each(lambda pipe, key: pipe.smembers(key), name))

    def events(self) -> list[dict[str, str]]:
        """The lifecycle events of all partitions, each partition's in order."""
        parts = self._of_each(lambda pipe, key: pipe.xrange(key), "events")
        return [fields for part in parts for _, fields in part]

    def _of_each(self, ask: Callable[[Any, str], Any], name: str) -> list[Any]:
        with self.redis.pipeline(transaction=False) as pipe:
            for prefix in self.prefixes:
                ask(pipe, prefix + name)
            return list(pipe.execute())

    def remove(self) -> None:
        """Delete every key of the namespace."""
        for key in self.redis.scan_iter(self.pattern, count=1000):
            self.redis.unlink(key)
