"""The original store, in Python.

A plain transliteration of the TypeScript original: sessions in a dict, the same twelve methods in
snake_case, and nothing more. No bounds, no refusals beyond its own.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import UTC, datetime
from uuid import uuid4


class SessionNotFoundError(Exception):
    """There is no session with this id."""


@dataclass
class AgentSession:
    """A session: one object, which the store goes on changing."""

    id: str
    type: str
    service_session_id: str
    status: str
    project_path: str
    task_id: str | None
    mcp_session_id: str | None
    created_at: str
    last_activity: str
    output_buffer: list[str] = field(default_factory=list)
    error_buffer: list[str] = field(default_factory=list)


@dataclass
class SessionMetrics:
    """How many sessions there are."""

    total_sessions: int
    active_sessions: int
    busy_sessions: int
    error_sessions: int
    sessions_by_type: dict[str, int]


def _now() -> str:
    return datetime.now(UTC).isoformat()


class SessionStore:
    """Sessions in the memory of one process."""

    def __init__(self) -> None:
        self.sessions: dict[str, AgentSession] = {}

    def create_session(
        self,
        type: str,
        service_session_id: str,
        project_path: str,
        task_id: str | None = None,
        mcp_session_id: str | None = None,
    ) -> AgentSession:
        session_id = f"agent_{type}_{uuid4()}"
        session = AgentSession(
            id=session_id,
            type=type,
            service_session_id=service_session_id,
            status="active",
            project_path=project_path,
            task_id=task_id,
            mcp_session_id=mcp_session_id,
            created_at=_now(),
            last_activity=_now(),
        )
        self.sessions[session_id] = session
        return session

    def get_session(self, session_id: str) -> AgentSession:
        session = self.sessions.get(session_id)
        if session is None:
            raise SessionNotFoundError(session_id)
        return session

    def find_session(self, session_id: str) -> AgentSession | None:
        return self.sessions.get(session_id)

    def find_session_by_service_id(self, service_session_id: str) -> AgentSession | None:
        for session in self.sessions.values():
            if session.service_session_id == service_session_id:
                return session
        return None

    def update_status(self, session_id: str, status: str) -> None:
        session = self.get_session(session_id)
        session.status = status
        session.last_activity = _now()

    def update_activity(self, session_id: str) -> None:
        session = self.get_session(session_id)
        session.last_activity = _now()

    def add_output(self, session_id: str, output: str) -> None:
        session = self.get_session(session_id)
        session.output_buffer.append(output)
        session.last_activity = _now()

    def add_error(self, session_id: str, error: str) -> None:
        session = self.get_session(session_id)
        session.error_buffer.append(error)
        session.last_activity = _now()

    def delete_session(self, session_id: str) -> bool:
        return self.sessions.pop(session_id, None) is not None

    def get_all_sessions(self) -> list[AgentSession]:
        return list(self.sessions.values())

    def get_sessions_by_type(self, type: str) -> list[AgentSession]:
        return [session for session in self.sessions.values() if session.type == type]

    def get_metrics(self) -> SessionMetrics:
        sessions = self.get_all_sessions()
        sessions_by_type: dict[str, int] = {}
        for session in sessions:
            sessions_by_type[session.type] = sessions_by_type.get(session.type, 0) + 1
        return SessionMetrics(
            total_sessions=len(sessions),
            active_sessions=len([s for s in sessions if s.status == "active"]),
            busy_sessions=len([s for s in sessions if s.status == "busy"]),
            error_sessions=len([s for s in sessions if s.status == "error"]),
            sessions_by_type=sessions_by_type,
        )
