"""What the lines of an export say, checked: their values, and the head of a session.

A file may have been edited or damaged, and whoever wrote it need not be a friend. So nothing of it
goes into the name of a key, or decides where a session belongs, that could not come from this
library.
"""

from __future__ import annotations

import base64
import re
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, cast

from sessionstore import arguments as check
from sessionstore.keys import Keys, Keyspace, fits
from sessionstore.models import ENDED_STATUSES
from sessionstore.settings import StoreSettings

MOST_FIELDS = 1000  # of one session

_ID = re.compile(r"agent_.+_[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", re.DOTALL)
_TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z")
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
#: A lease and the reaper's mark are not carried over as they are.
OF_LEASES = ("fence", "lease_expires_at", "reap_seen_ms")


class InvalidLineError(Exception):
    """What a line says is no session, or no line of an export."""


def stored_bytes(value: Any) -> bytes:
    """Stored bytes, from what a file has of them."""
    try:
        if isinstance(value, str):
            return value.encode()
        if isinstance(value, dict) and set(cast("Any", value)) == {"base64"}:
            return base64.b64decode(cast("Any", value)["base64"], validate=True)
    except (ValueError, TypeError):
        pass
    raise InvalidLineError(f"neither text nor base64: {value!r:.80}")


def whole(value: Any, what: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**53:
        raise InvalidLineError(f"{what} is no number from 0 up: {value!r:.80}")
    return value


def listed(value: Any, what: str) -> list[Any]:
    if not isinstance(value, list):
        raise InvalidLineError(f"{what} is no list: {value!r:.80}")
    items: list[Any] = cast("Any", value)
    return items


def _microseconds(text: str, name: str) -> int:
    try:
        if _TIME.fullmatch(text):
            return (datetime.fromisoformat(text) - _EPOCH) // timedelta(microseconds=1)
    except ValueError:
        pass
    raise InvalidLineError(f"{name} is no time: {text!r:.80}")


@dataclass(frozen=True, slots=True)
class Head:
    """What a session's first line says, checked."""

    id: str
    keys: Keys
    type: str
    status: str
    fields: dict[bytes, bytes]  # apart from those of its lease
    indexes: tuple[str, ...]
    created_us: int
    active_us: int  # or when it ended
    owner: str | None
    fence: str
    expires_ms: int | None

    @classmethod
    def read(cls, told: dict[str, Any], keyspace: Keyspace, settings: StoreSettings) -> Head:
        """The head of a session of this namespace.

        Raises:
            InvalidArgumentError: it breaks a rule.
            InvalidLineError: it is no session.
        """
        stored = _fields(told)

        def text(name: str, default: str | None = None) -> str:
            value = stored.get(name.encode())
            if value is None:
                if default is not None:
                    return default
                raise InvalidLineError(f"it has no {name}")
            try:
                return value.decode()
            except UnicodeDecodeError:
                raise InvalidLineError(f"{name} is no text") from None

        def optional_id(name: str) -> str | None:
            return check.text(name, text(name)) if name.encode() in stored else None

        type = check.session_type(text("type"), settings.types)
        status = check.status("status", text("status"))
        service = check.text("service_session_id", text("service_session_id"))
        session_id = told["session"]
        if not (
            isinstance(session_id, str)
            and _ID.fullmatch(session_id)
            and session_id[6:-37] == type
            and fits(session_id, service)
            and text("id") == session_id
        ):
            raise InvalidLineError("its id does not fit its type and service session")
        keys = keyspace.of_session(session_id)
        indexes = [keys.by_type(type), keys.by_status(status), keys.by_service(service)]
        owner = optional_id("owner")
        for index, value in (
            (keys.by_task, optional_id("task_id")),
            (keys.by_mcp, optional_id("mcp_session_id")),
            (keys.by_owner, owner),
        ):
            if value is not None:
                indexes.append(index(value))
        created_us = _microseconds(text("created_at"), "created_at")
        last_us = _microseconds(text("last_activity"), "last_activity")
        given_us = told.get("ended_us" if status in ENDED_STATUSES else "activity_us")
        fence = text("fence", "")
        if fence and not (fence.isdecimal() and fence.isascii() and len(fence) <= 15):
            raise InvalidLineError("its fence is no number")
        expires_at = text("lease_expires_at", "")
        expires_ms = _microseconds(expires_at, "lease_expires_at") // 1000 if expires_at else None
        own_us = told.get("created_us")
        return cls(
            id=session_id,
            keys=keys,
            type=type,
            status=status,
            fields={n: v for n, v in stored.items() if n.decode(errors="replace") not in OF_LEASES},
            indexes=tuple(indexes),
            created_us=created_us if own_us is None else whole(own_us, "created_us"),
            active_us=last_us if given_us is None else whole(given_us, "its last activity"),
            owner=owner,
            fence=fence,
            expires_ms=expires_ms,
        )

    def total(self, buffer: str) -> int:
        """How many entries it says that a buffer ever had."""
        stored = self.fields.get(f"{buffer}_total".encode(), b"0")
        if not stored.isdigit() or len(stored) > 15:
            raise InvalidLineError(f"its {buffer}_total is no number")
        return int(stored)


def _fields(told: dict[str, Any]) -> dict[bytes, bytes]:
    names = told.get("fields")
    if not isinstance(names, dict):
        raise InvalidLineError("it has no fields")
    stored = {stored_bytes(n): stored_bytes(v) for n, v in cast("dict[str, Any]", names).items()}
    for pair in listed(told.get("more_fields", []), "more_fields"):
        name, value = (*listed(pair, "a field"), None, None)[:2]
        stored[stored_bytes(name)] = stored_bytes(value)
    if len(stored) > MOST_FIELDS:
        raise InvalidLineError(f"it has over {MOST_FIELDS} fields")
    return stored
