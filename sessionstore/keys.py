"""Every key name, in one place.

A namespace has 1, 16 or 256 partitions. All keys of a partition share one hash tag, so that every
script is legal on Redis Cluster: the namespace in braces, and with several partitions the
partition's digits in it too. The scripts build the few names that only they can know (the index
sets of a session's stored fields) from the same prefix.
"""

from __future__ import annotations

from binascii import crc_hqx
from functools import cached_property
from uuid import uuid4

PARTITIONS = (1, 16, 256)
_TWO_DIGITS = {f"{number:02x}": number for number in range(256)}


class Keyspace:
    """The partitions of one namespace, and which of them a session is in.

    The first two hex digits of a session's UUID follow from its service session id, so either id
    alone tells the partition: both digits with 256 partitions, the first of them with 16.
    """

    def __init__(self, namespace: str, partitions: int) -> None:
        self._namespace = namespace
        self._partitions = partitions
        #: The one key that is in no partition.
        self.meta = f"{{{namespace}}}:meta"
        #: What the channel begins with on which a store speaks to itself; no key.
        self.news = f"{{{namespace}}}:news:"

    @cached_property
    def all(self) -> tuple[Keys, ...]:
        """Every partition's keys."""
        if self._partitions == 1:
            return (Keys(self._namespace),)
        # A digit twice: a single one would spread badly over the nodes of a cluster.
        digits = [
            f"{n:x}" * 2 if self._partitions == 16 else f"{n:02x}" for n in range(self._partitions)
        ]
        return tuple(Keys(f"{self._namespace}/{tag}") for tag in digits)

    def of_session(self, session_id: str) -> Keys:
        """The keys of the partition that a session is in."""
        return self._holding(_TWO_DIGITS.get(session_id[-36:-34], 0))

    def of_service(self, service_session_id: str) -> Keys:
        """The keys of the partition that a service session's sessions are in."""
        return self._holding(_service_digits(service_session_id))

    def _holding(self, digits: int) -> Keys:
        return self.all[digits * self._partitions >> 8]


class Keys:
    """The key names of one partition."""

    def __init__(self, tag: str) -> None:
        prefix = f"{{{tag}}}:"
        self.prefix = prefix
        self.sessions = f"{prefix}sessions"
        self.types = f"{prefix}types"
        self.activity = f"{prefix}activity"
        self.ended = f"{prefix}ended"
        self.leases = f"{prefix}leases"
        self.events = f"{prefix}events"
        self.reaping = f"{prefix}reaping"

    def session(self, session_id: str) -> str:
        # No session's id has a colon. One that a caller asks for may, and must then not name
        # another session's buffer.
        return f"{self.prefix}session:{session_id.replace(':', '%3A')}"

    def output(self, session_id: str) -> str:
        return f"{self.session(session_id)}:output"

    def errors(self, session_id: str) -> str:
        return f"{self.session(session_id)}:errors"

    def staged(self, session_id: str, buffer: str) -> str:
        """Where a buffer of a session is kept until the session is imported."""
        return f"{self.prefix}import:{session_id}:{buffer}"

    def by_type(self, type: str) -> str:
        return f"{self.prefix}sessions:type:{type}"

    def by_status(self, status: str) -> str:
        return f"{self.prefix}sessions:status:{status}"

    def by_service(self, service_session_id: str) -> str:
        return f"{self.prefix}sessions:service:{service_session_id}"

    def by_task(self, task_id: str) -> str:
        return f"{self.prefix}sessions:task:{task_id}"

    def by_mcp(self, mcp_session_id: str) -> str:
        return f"{self.prefix}sessions:mcp:{mcp_session_id}"

    def by_owner(self, owner: str) -> str:
        return f"{self.prefix}sessions:owner:{owner}"

    @staticmethod
    def guard_of(key: str) -> str:
        """The key in a key's slot that is never there; see ``clusters.py``."""
        return f"{key[: key.index('}')]}}}:never"

    def lane(self, name: str) -> str:
        return f"{self.prefix}lane:{name}"


def _service_digits(service_session_id: str) -> int:
    # CRC-16/XMODEM, Redis Cluster's own.
    return crc_hqx(service_session_id.encode(), 0) & 0xFF


def fits(session_id: str, service_session_id: str) -> bool:
    """Whether both ids tell the same partition, however many there are."""
    return session_id[-36:-34] == f"{_service_digits(service_session_id):02x}"


def new_session_id(type: str, service_session_id: str) -> str:
    """A session id: ``agent_<type>_<uuid4>``, its first two digits as in ``Keyspace``."""
    return f"agent_{type}_{_service_digits(service_session_id):02x}{str(uuid4())[2:]}"
