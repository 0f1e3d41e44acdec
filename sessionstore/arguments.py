"""What the public arguments may be.

Everything is checked before anything is sent, and a refusal names the argument and the rule. A
check returns the value to go on with: an exact ``str``, where the caller may have given a member
of an enumeration, which formats as something else.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from sessionstore.errors import InvalidArgumentError, UnknownSessionTypeError
from sessionstore.models import STATUSES, AgentSessionStatus
from sessionstore.settings import TYPE_PATTERN

MAX_ID_LENGTH = 512  # characters
MAX_PATH_LENGTH = 4096  # characters, as PATH_MAX on Linux
MAX_CHUNKS = 10_000  # in one call
MAX_CALL_BYTES = 64 * 1024 * 1024  # of chunks in one call; Redis takes 512 MiB an argument
MAX_METADATA_NAMES = 64
MAX_METADATA_BYTES = 4096
MAX_PAGE = 1000  # entries

_TYPE = re.compile(TYPE_PATTERN)
_METADATA_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")


def _utf8(name: str, value: str) -> bytes:
    try:
        return value.encode()
    except UnicodeEncodeError:
        raise InvalidArgumentError.of(
            name, "has a lone surrogate, which UTF-8 cannot carry"
        ) from None


def text(name: str, value: Any, longest: int = MAX_ID_LENGTH) -> str:
    """An id or a path: not empty, not over-long, without control characters."""
    if type(value) is str and value.isascii() and value.isprintable() and 0 < len(value) <= longest:
        return value  # as good as all are, at a third of the cost
    if not isinstance(value, str):
        raise InvalidArgumentError.of(name, f"must be a str, not {type(value).__name__}")
    if not value:
        raise InvalidArgumentError.of(name, "must not be empty")
    if len(value) > longest:
        raise InvalidArgumentError.of(name, f"is longer than {longest} characters")
    if _CONTROL.search(value):
        raise InvalidArgumentError.of(name, f"has a control character: {value[:80]!r}")
    _utf8(name, value)
    return _exact(value)


def _exact(value: str) -> str:
    return str.__str__(value)


def session_type(value: Any, accepted: frozenset[str] | None) -> str:
    """An agent's type."""
    if not isinstance(value, str) or not _TYPE.fullmatch(value):
        raise InvalidArgumentError.of("type", f"must match {_TYPE.pattern}, not {value!r:.80}")
    if accepted is not None and value not in accepted:
        error = UnknownSessionTypeError(
            f"type {value!r} is not accepted here; accepted: {', '.join(sorted(accepted))}"
        )
        error.argument = "type"
        raise error
    return _exact(value)


def status(name: str, value: Any) -> AgentSessionStatus:
    """A session's status."""
    for known in STATUSES:
        if value == known:
            return known
    raise InvalidArgumentError.of(name, f"must be one of {', '.join(STATUSES)}, not {value!r:.80}")


def statuses(name: str, value: Any) -> tuple[AgentSessionStatus, ...]:
    """One status or several."""
    several: Iterable[Any] = (value,) if isinstance(value, str) else value
    try:
        checked: dict[AgentSessionStatus, None] = {status(name, one): None for one in several}
    except TypeError:
        raise InvalidArgumentError.of(name, "must be a status or several") from None
    if not checked:
        raise InvalidArgumentError.of(name, "must name at least one status")
    return tuple(checked)


def whole(name: str, value: Any, least: int, most: int | None = None) -> int:
    """A whole number within bounds."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise InvalidArgumentError.of(name, f"must be an int, not {type(value).__name__}")
    if value < least or (most is not None and value > most):
        bounds = f"at least {least}" if most is None else f"from {least} to {most}"
        raise InvalidArgumentError.of(name, f"must be {bounds}, not {value}")
    return value


def flag(name: str, value: Any) -> bool:
    """True or False, not something that is merely one of them in an ``if``."""
    if not isinstance(value, bool):
        raise InvalidArgumentError.of(name, f"must be True or False, not {value!r:.80}")
    return value


def tail(value: Any) -> int | None:
    """How many of the newest entries to load; None for all."""
    return None if value is None else whole("tail", value, 0)


def seconds(name: str, value: Any, least: float = 0, most: float | None = None) -> float:
    """A duration in seconds."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise InvalidArgumentError.of(name, f"must be seconds, not {type(value).__name__}")
    if not 0 <= value < 1e10:  # not NaN, not infinite
        raise InvalidArgumentError.of(name, f"must be a number of seconds from 0 up, not {value}")
    if value < least or (most is not None and value > most):
        raise InvalidArgumentError.of(name, f"must be {least:g} to {most:g} seconds, not {value}")
    return float(value)


def chunks(
    values: tuple[Any, ...], redact: Callable[[str], str] | None, limit: int
) -> tuple[str, ...]:
    """Entries of a buffer, ready to be stored.

    Bytes are decoded as UTF-8 with replacement: no line may be lost to a decode error.
    """
    if len(values) == 1 and redact is None:  # the most frequent, at a third of the cost
        (only,) = values
        if type(only) is str and only.isascii() and len(only) <= limit:
            return values
    if not values:
        raise InvalidArgumentError.of("chunks", "must be at least one")
    if len(values) > MAX_CHUNKS:
        raise InvalidArgumentError.of("chunks", f"are over {MAX_CHUNKS}: call again")
    # No loop in Python where all is as it mostly is: 10,000 entries in 0.4 ms.
    texts = values if set(map(type, values)) == {str} else tuple(map(_decoded, values))
    if redact is not None:
        texts = tuple(_redacted(redact(text)) for text in texts)
    joined = "".join(texts)
    if joined.isascii():  # then a character is a byte
        longest, total = max(map(len, texts)), len(joined)
    else:
        sizes = [len(_utf8("chunk", text)) for text in texts]
        longest, total = max(sizes), sum(sizes)
    if longest > limit:
        raise InvalidArgumentError.of("chunk", f"is {longest} bytes, over the limit of {limit}")
    if total > MAX_CALL_BYTES:
        raise InvalidArgumentError.of(
            "chunks", f"are {total} bytes, over {MAX_CALL_BYTES}: send them in several calls"
        )
    return texts


def _decoded(value: Any) -> str:
    if isinstance(value, str):
        return _exact(value)
    if isinstance(value, (bytes, bytearray)):
        return bytes(value).decode(errors="replace")
    raise InvalidArgumentError.of("chunk", f"must be str or bytes, not {type(value).__name__}")


def _redacted(value: Any) -> str:
    if not isinstance(value, str):
        raise InvalidArgumentError.of("redact", f"must return a str, not {type(value).__name__}")
    return _exact(value)


def metadata(value: Any) -> dict[str, str | None]:
    """Names and values of a session's metadata; None removes a name."""
    if not isinstance(value, Mapping):
        raise InvalidArgumentError.of("metadata", f"must be a mapping, not {type(value).__name__}")
    if len(value) > MAX_METADATA_NAMES:  # pyright: ignore[reportUnknownArgumentType]
        raise InvalidArgumentError.of("metadata", f"has over {MAX_METADATA_NAMES} names")
    checked: dict[str, str | None] = {}
    for name, content in value.items():  # pyright: ignore[reportUnknownVariableType]
        if not isinstance(name, str) or not _METADATA_NAME.fullmatch(name):
            raise InvalidArgumentError.of(
                "metadata", f"names must match {_METADATA_NAME.pattern}, not {name!r:.80}"
            )
        if content is not None:
            if not isinstance(content, str):
                raise InvalidArgumentError.of(f"metadata {name!r}", "must be a str or None")
            if len(_utf8(f"metadata {name!r}", content)) > MAX_METADATA_BYTES:
                raise InvalidArgumentError.of(
                    f"metadata {name!r}", f"is over {MAX_METADATA_BYTES} bytes"
                )
        checked[_exact(name)] = None if content is None else _exact(content)
    return checked
