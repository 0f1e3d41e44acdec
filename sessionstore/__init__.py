"""sessionstore: a shared session store on Redis for agent managers.

    >>> from sessionstore import SessionStore
    >>> store = SessionStore.from_url("redis://localhost:6379")       # doctest: +SKIP
    >>> session = store.create_session("claude", "service-1", "/src") # doctest: +SKIP

``SessionStore`` is for threads, ``AsyncSessionStore`` for asyncio; both have the same methods.
"""

from logging import NullHandler, getLogger

from sessionstore._operation import Outcome
from sessionstore._version import __version__
from sessionstore.batch import AsyncBatch, Batch
from sessionstore.errors import (
    DurabilityError,
    ImportConflictError,
    ImportFormatError,
    InvalidArgumentError,
    LeaseLostError,
    MetadataLimitError,
    OutcomeUnknownError,
    SchemaMismatchError,
    ServiceSessionInUseError,
    SessionBusyError,
    SessionExistsError,
    SessionNotActiveError,
    SessionNotFoundError,
    SessionStatusError,
    SessionStoreError,
    UnknownSessionTypeError,
    UnreadableSessionError,
    UnsafeServerError,
    WritesLostError,
)
from sessionstore.lease import AsyncLease, Lease
from sessionstore.models import (
    AgentSession,
    AgentSessionStatus,
    BufferPage,
    Drift,
    Imported,
    Problem,
    Reaped,
    SessionEvent,
    SessionMetrics,
)
from sessionstore.reaper import AsyncReaper, Reaper
from sessionstore.settings import StoreSettings
from sessionstore.store import AsyncSessionStore, SessionStore
from sessionstore.writer import AsyncWriter, Writer

__all__ = [
    "AgentSession",
    "AgentSessionStatus",
    "AsyncBatch",
    "AsyncLease",
    "AsyncReaper",
    "AsyncSessionStore",
    "AsyncWriter",
    "Batch",
    "BufferPage",
    "Drift",
    "DurabilityError",
    "ImportConflictError",
    "ImportFormatError",
    "Imported",
    "InvalidArgumentError",
    "Lease",
    "LeaseLostError",
    "MetadataLimitError",
    "Outcome",
    "OutcomeUnknownError",
    "Problem",
    "Reaped",
    "Reaper",
    "SchemaMismatchError",
    "ServiceSessionInUseError",
    "SessionBusyError",
    "SessionEvent",
    "SessionExistsError",
    "SessionMetrics",
    "SessionNotActiveError",
    "SessionNotFoundError",
    "SessionStatusError",
    "SessionStore",
    "SessionStoreError",
    "StoreSettings",
    "UnknownSessionTypeError",
    "UnreadableSessionError",
    "UnsafeServerError",
    "Writer",
    "WritesLostError",
    "__version__",
]

getLogger("sessionstore").addHandler(NullHandler())
