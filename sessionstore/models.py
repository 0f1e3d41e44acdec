"""What a user sees: frozen values with aware datetimes and tuples.

``model_dump(by_alias=True, mode="json")`` gives the wire names of the TypeScript original.
"""

from __future__ import annotations

from datetime import datetime
from typing import Literal, get_args

from pydantic import BaseModel, Field

AgentSessionStatus = Literal["starting", "active", "busy", "error", "terminated"]
STATUSES: tuple[AgentSessionStatus, ...] = get_args(AgentSessionStatus)
#: The statuses of a session that has ended.
ENDED_STATUSES: tuple[AgentSessionStatus, ...] = ("terminated", "error")
#: The others.
LIVE_STATUSES: tuple[AgentSessionStatus, ...] = ("starting", "active", "busy")


class AgentSession(BaseModel, frozen=True):
    """One session as it was at ``read_at``.

    ``output_buffer`` and ``error_buffer`` hold the entries that were asked for, oldest first;
    ``output_total`` and ``error_total`` count all that were ever added. Times are the server's.
    """

    id: str
    type: str
    service_session_id: str = Field(serialization_alias="serviceSessionId")
    status: AgentSessionStatus
    project_path: str = Field(serialization_alias="projectPath")
    task_id: str | None = Field(default=None, serialization_alias="taskId")
    mcp_session_id: str | None = Field(default=None, serialization_alias="mcpSessionId")
    created_at: datetime
    last_activity: datetime
    output_buffer: tuple[str, ...] = ()
    error_buffer: tuple[str, ...] = ()
    output_total: int = 0
    error_total: int = 0
    metadata: dict[str, str] = {}
    owner: str | None = None
    lease_expires_at: datetime | None = None
    read_at: datetime

    @property
    def idle_for(self) -> float:
        """Seconds since the last activity, when the session was read."""
        return (self.read_at - self.last_activity).total_seconds()

    @property
    def ended(self) -> bool:
        """Whether the session is ``terminated`` or ``error``."""
        return self.status in ENDED_STATUSES


class SessionMetrics(BaseModel, frozen=True):
    """How many sessions there are, by status and by type."""

    total_sessions: int = Field(serialization_alias="totalSessions")
    active_sessions: int = Field(serialization_alias="activeSessions")
    busy_sessions: int = Field(serialization_alias="busySessions")
    error_sessions: int = Field(serialization_alias="errorSessions")
    sessions_by_type: dict[str, int] = Field(serialization_alias="sessionsByType")
    sessions_by_status: dict[AgentSessionStatus, int] = Field(
        serialization_alias="sessionsByStatus"
    )


class Reaped(BaseModel, frozen=True):
    """What ``reap`` has done with a session, or with ``dry_run`` would do, and why.

    ``action``: ``marked`` (its lease has expired; a later pass ends it unless it is renewed),
    ``lost`` (its worker is: the session is ``error`` now), ``terminated`` (it was idle) or
    ``deleted`` (it had ended, and its time was over). ``status`` is what it had been, ``owner``
    the lost worker.
    """

    session_id: str
    action: Literal["marked", "lost", "terminated", "deleted"]
    reason: str
    status: AgentSessionStatus
    owner: str | None = None


ProblemKind = Literal[
    "index_missing",
    "index_score",
    "index_stray",
    "index_orphan",
    "buffer_orphan",
    "buffer_total",
    "buffer_bytes",
    "buffer_over_bound",
    "field_restored",
    "field_unreadable",
    "lease_torn",
    "lease_overdue",
    "wrong_type",
    "expiry",
    "lane_lasting",
    "wrong_partition",
    "unknown_key",
    "layout",
    "layout_missing",
    "drift",
    "server",
]


class Problem(BaseModel, frozen=True):
    """What ``check`` has found, or ``repair``; the README has the kinds.

    ``mending`` says what ``repair`` does about it, or who else must; ``mendable`` is whether
    ``repair`` does, ``repaired`` whether it has. A ``warning`` is about what may go wrong: nothing
    is damaged.
    """

    kind: ProblemKind
    key: str
    session_id: str | None = None
    message: str
    mending: str
    mendable: bool = True
    warning: bool = False
    repaired: bool = False


class Drift(BaseModel, frozen=True):
    """Three ways to count all sessions; they differ only if an index has been damaged.

    ``sessions``: listed by creation; ``by_status``, ``by_type``: the sums over all statuses and
    types; ``by_time``: live ones by activity and ended ones by their end.
    """

    sessions: int
    by_status: int
    by_type: int
    by_time: int

    @property
    def found(self) -> bool:
        """Whether they differ."""
        return len({self.sessions, self.by_status, self.by_type, self.by_time}) > 1


class Imported(BaseModel, frozen=True):
    """What an import has done, or with ``dry_run`` would do.

    ``imported`` sessions are new here, ``replaced`` ones took another's place, ``unchanged`` ones
    were here already, the same. ``differing`` ones were here and are left as they are;
    ``differing_ids`` are the first 1,000 of them. ``unreadable`` ones could not be read when they
    were exported, or break the rules of a session.
    """

    imported: int = 0
    replaced: int = 0
    unchanged: int = 0
    differing: int = 0
    unreadable: int = 0
    differing_ids: tuple[str, ...] = ()


class BufferPage(BaseModel, frozen=True):
    """A stretch of a buffer.

    ``chunks`` are the entries up to position ``cursor``, where the next page begins; positions
    count entries since the session began. ``dropped`` entries between the asked cursor and the
    first chunk had been trimmed away. ``lost`` is 0, or how far the asked cursor lay beyond the
    end: the server has lost writes. ``ended``: the session has ended and this page reaches the
    end of the buffer. ``deleted``: the session has been deleted, and ``dropped`` entries with it
    that had not been read; only what follows a buffer tells that, a single page is an error then.
    """

    chunks: tuple[str, ...]
    cursor: int
    dropped: int = 0
    lost: int = 0
    ended: bool = False
    deleted: bool = False


class SessionEvent(BaseModel, frozen=True):
    """Something that has happened to a session, and who did it.

    ``event``: ``created``, ``status_changed``, ``claimed``, ``released``, ``lease_expired``,
    ``deleted`` or ``imported``; later versions may know others. ``old_status`` and ``status`` are
    given where they apply, ``owner`` is the worker whose lease began or ended. ``at`` is the
    server's time. ``cursor`` is where to go on watching, a text to be kept as it is. ``gap``:
    events between the asked cursor and this one have been trimmed away, or may have been.
    """

    cursor: str
    at: datetime
    session_id: str
    type: str
    event: str
    old_status: str | None = None
    status: str | None = None
    actor: str | None = None
    owner: str | None = None
    gap: bool = False
