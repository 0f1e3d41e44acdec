"""Every key name, in one place.

All keys of a namespace share one hash tag, the namespace in braces, so that every script is legal
on Redis Cluster. The scripts build the few names that only they can know (the index sets of a
session's stored fields) from the same prefix.
"""

from __future__ import annotations

from binascii import crc_hqx
from uuid import uuid4


class Keys:
    """The key names of one namespace."""

    def __init__(self, namespace: str) -> None:
        prefix = f"{{{namespace}}}:"
        self.prefix = prefix
        self.meta = f"{prefix}meta"
        self.sessions = f"{prefix}sessions"
        self.types = f"{prefix}types"
        self.activity = f"{prefix}activity"
        self.ended = f"{prefix}ended"
        self.leases = f"{prefix}leases"
        self.events = f"{prefix}events"

    def session(self, session_id: str) -> str:
        # No session's id has a colon. One that a caller asks for may, and must then not name
        # another session's buffer.
        return f"{self.prefix}session:{session_id.replace(':', '%3A')}"

    def output(self, session_id: str) -> str:
        return f"{self.session(session_id)}:output"

    def errors(self, session_id: str) -> str:
        return f"{self.session(session_id)}:errors"

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

    def lane(self, name: str) -> str:
        return f"{self.prefix}lane:{name}"


def new_session_id(type: str, service_session_id: str) -> str:
    """A session id: ``agent_<type>_<uuid4>``.

    The UUID's first two digits follow from the service session id (CRC-16/XMODEM, Redis Cluster's
    own), so that one day either id alone tells in which partition the session is.
    """
    digits = f"{crc_hqx(service_session_id.encode(), 0) & 0xFF:02x}"
    return f"agent_{type}_{digits}{str(uuid4())[2:]}"
