"""Bad arguments: each is refused by name and rule, and nothing is sent.

The stores here are on a port where nobody listens: had anything been sent, it would have failed
otherwise.
"""

from __future__ import annotations

import asyncio
import inspect
import re
from collections.abc import Iterator
from enum import Enum
from typing import Any

import pytest
import redis
from conftest import Awaiting

from sessionstore import (
    AsyncReaper,
    AsyncSessionStore,
    InvalidArgumentError,
    Reaper,
    SessionStore,
    SessionStoreError,
    UnknownSessionTypeError,
)
from sessionstore.operations import SessionOperations

NOBODY = "redis://127.0.0.1:1/0"
ID = "agent_claude_00000000-0000-4000-8000-000000000000"

#: A good call of every operation. ``chunks`` is what goes into ``*chunks``.
GOOD: dict[str, dict[str, Any]] = {
    "create_session": {"type": "claude", "service_session_id": "s", "project_path": "/src"},
    "get_session": {"session_id": ID},
    "find_session": {"session_id": ID},
    "find_session_by_service_id": {"service_session_id": "s"},
    "update_status": {"session_id": ID, "status": "busy"},
    "update_activity": {"session_id": ID},
    "add_output": {"session_id": ID, "chunks": ("text",)},
    "add_error": {"session_id": ID, "chunks": ("text",)},
    "delete_session": {"session_id": ID},
    "get_all_sessions": {},
    "get_sessions_by_type": {"type": "claude"},
    "get_metrics": {},
    "find_sessions": {},
    "iter_sessions": {},
    "export_sessions": {},
    "check": {},
    "repair": {},
    "drift": {},
    "read_output": {"session_id": ID},
    "read_errors": {"session_id": ID},
    "follow_output": {"session_id": ID},
    "follow_errors": {"session_id": ID},
    "watch": {},
    "update_metadata": {"session_id": ID, "metadata": {"branch": "main"}},
    "reap": {},
    "ping": {},
    "claim": {"session_id": ID, "expected": ("active", "busy")},
}

MIB = 1024 * 1024


def _text(longest: int) -> list[tuple[Any, str]]:
    return [
        ("", "must not be empty"),
        ("x" * (longest + 1), f"is longer than {longest} characters"),
        ("a\x00b", "has a control character"),
        ("line\n", "has a control character"),
        ("\x1b[31m", "has a control character"),
        ("a\x7f", "has a control character"),
        ("a\x85b", "has a control character"),
        ("a\u2028b", "has a control character"),
        ("a\ud800b", "has a lone surrogate"),
        (5, "must be a str, not int"),
        (b"bytes", "must be a str, not bytes"),
    ]


ID_TEXT = [*_text(512), (None, "must be a str, not NoneType")]
OPTIONAL_ID = _text(512)
STATUS = [
    ("asleep", "must be one of starting, active, busy, error, terminated, not 'asleep'"),
    ("", "must be one of"),
    ("Active", "must be one of"),
    (5, "must be one of"),
    (["active"], "must be one of"),
    (None, "must be one of"),
]
STATUSES = [
    ("asleep", "must be one of"),
    (("active", "asleep"), "must be one of"),
    ((), "must name at least one status"),
    (5, "must be a status or several"),
    ([5], "must be one of"),
]
TYPE = [
    ("", "must match"),
    ("Claude", "must match"),
    ("1claude", "must match"),
    ("claude code", "must match"),
    ("claude\n", "must match"),
    ("claude:x", "must match"),
    ("x" * 33, "must match"),
    ("cläude", "must match"),
    (5, "must match"),
]
TAIL = [
    (-1, "must be at least 0, not -1"),
    (1.5, "must be an int, not float"),
    ("1", "must be an int, not str"),
    (True, "must be an int, not bool"),
]
CHUNKS = [
    ((), "chunks must be at least one"),
    (("x",) * 10_001, "chunks are over 10000: call again"),
    ((5,), "chunk must be str or bytes, not int"),
    ((None,), "chunk must be str or bytes, not NoneType"),
    ((["x"],), "chunk must be str or bytes, not list"),
    (("good", "\ud800"), "chunk has a lone surrogate"),
    (("x" * (MIB + 1),), "chunk is 1048577 bytes, over the limit of 1048576"),
    (("é" * (MIB // 2) + "x",), "chunk is 1048577 bytes, over the limit of 1048576"),
    (("x" * MIB,) * 65, "send them in several calls"),
]
METADATA = [
    ("branch", "must be a mapping, not str"),
    ([("branch", "main")], "must be a mapping, not list"),
    ({f"n{i}": "" for i in range(65)}, "has over 64 names"),
    ({"": "x"}, "names must match"),
    ({"a b": "x"}, "names must match"),
    ({"a:b": "x"}, "names must match"),
    ({"x" * 65: "x"}, "names must match"),
    ({"é": "x"}, "names must match"),
    ({5: "x"}, "names must match"),
    ({"pid": 42}, "metadata 'pid' must be a str or None"),
    ({"pid": b"42"}, "metadata 'pid' must be a str or None"),
    ({"log": "é" * 2048 + "x"}, "metadata 'log' is over 4096 bytes"),
    ({"log": "\ud800"}, "metadata 'log' has a lone surrogate"),
]
LIMIT = [
    (-1, "must be at least 0"),
    (1.0, "must be an int"),
    ("9", "must be an int"),
    (True, "must be an int"),
]
PAGE = [
    (0, "must be from 1 to 1000, not 0"),
    (1001, "must be from 1 to 1000"),
    (-1, "must be from 1 to 1000"),
    (None, "must be an int"),
    (1.0, "must be an int"),
]
CURSOR = [
    (-1, "must be at least 0, not -1"),
    ("0", "must be an int, not str"),
    (None, "must be an int"),
    (False, "must be an int, not bool"),
]
SECONDS = [
    (-1, "must be a number of seconds from 0 up"),
    ("60", "must be seconds, not str"),
    (float("nan"), "must be a number"),
    (float("inf"), "must be a number"),
    (1e10, "must be a number"),
    (True, "must be seconds, not bool"),
]
TTL = [
    *SECONDS,
    (0, "must be 0.1 to 86400 seconds, not 0"),
    (0.09, "must be 0.1 to 86400 seconds"),
    (86_401, "must be 0.1 to 86400 seconds"),
    (None, "must be seconds, not NoneType"),
]
ORDER = [
    ("newest", "must be 'created' or '-last_activity', not 'newest'"),
    ("-created", "must be"),
    (None, "must be"),
    (5, "must be"),
]

_FILTERS = {
    "type": TYPE,
    "status": STATUSES,
    "task_id": OPTIONAL_ID,
    "mcp_session_id": OPTIONAL_ID,
    "service_session_id": OPTIONAL_ID,
    "owner": OPTIONAL_ID,
    "idle_for": SECONDS,
}
_READ = {"session_id": ID_TEXT, "cursor": CURSOR, "limit": PAGE}
_FOLLOW = {"session_id": ID_TEXT, "cursor": CURSOR}
_APPEND = {"session_id": ID_TEXT, "chunks": CHUNKS}

#: method → argument → (bad value, what the message says)
BAD: dict[str, dict[str, list[tuple[Any, str]]]] = {
    "create_session": {
        "type": [*TYPE, (None, "must match")],
        "service_session_id": ID_TEXT,
        "project_path": [*_text(4096), (None, "must be a str")],
        "task_id": OPTIONAL_ID,
        "mcp_session_id": OPTIONAL_ID,
        "status": STATUS,
        "metadata": METADATA,
    },
    "get_session": {"session_id": ID_TEXT, "tail": TAIL},
    "find_session": {"session_id": ID_TEXT, "tail": TAIL},
    "find_session_by_service_id": {"service_session_id": OPTIONAL_ID, "tail": TAIL},
    "update_status": {"session_id": ID_TEXT, "status": STATUS, "expected": STATUSES},
    "update_activity": {"session_id": ID_TEXT},
    "add_output": _APPEND,
    "add_error": _APPEND,
    "delete_session": {"session_id": ID_TEXT},
    "get_all_sessions": {"tail": TAIL},
    "get_sessions_by_type": {"type": TYPE, "tail": TAIL},
    "get_metrics": {},
    "find_sessions": {**_FILTERS, "order": ORDER, "limit": LIMIT, "tail": TAIL},
    "iter_sessions": {**_FILTERS, "tail": TAIL},
    "export_sessions": _FILTERS,
    "check": {},
    "repair": {},
    "drift": {},
    "read_output": _READ,
    "read_errors": _READ,
    "follow_output": _FOLLOW,
    "follow_errors": _FOLLOW,
    "watch": {
        "cursor": [
            (0, "must be a str, not int"),
            ("", "is not an event's"),
            ("yesterday", "is not an event's"),
            ("1-2-3", "is not an event's"),
            ("99999999999999999999-0", "is not an event's"),
            ("1-1,2-2", "is of a store with 2 partitions, this one has 1"),
        ]
    },
    "update_metadata": {
        "session_id": ID_TEXT,
        "metadata": [*METADATA, (None, "must be a mapping")],
    },
    "reap": {"idle_for": SECONDS, "ended_for": SECONDS, "limit": PAGE},
    "ping": {},
    "claim": {
        "session_id": ID_TEXT,
        "ttl": TTL,
        "wait": [*SECONDS, (None, "must be seconds, not NoneType")],
        "expected": [*STATUSES, (None, "must be a status or several")],
    },
}

#: Any value has a truth: there is no bad one.
SWITCHES = {"unique", "live", "force", "dry_run"}

CASES = [
    pytest.param(method, argument, values, id=f"{method}-{argument}")
    for method, arguments in BAD.items()
    for argument, values in arguments.items()
]


@pytest.fixture(scope="module", params=["sync", "async"])
def unreachable(request: pytest.FixtureRequest) -> Iterator[Any]:
    """A store on a port where nobody listens."""
    if request.param == "sync":
        with SessionStore.from_url(NOBODY, deadline=0.05) as store:
            yield store
        return
    with asyncio.Runner() as runner:
        awaiting = Awaiting(AsyncSessionStore.from_url(NOBODY, deadline=0.05), runner)
        yield awaiting
        awaiting.close()


def call(store: Any, method: str, arguments: dict[str, Any]) -> Any:
    chunks = arguments.pop("chunks", None)
    if chunks is not None:
        return getattr(store, method)(arguments["session_id"], *chunks)
    return getattr(store, method)(**arguments)


@pytest.mark.parametrize(("method", "argument", "values"), CASES)
def test_a_bad_argument_is_named_and_nothing_is_sent(
    unreachable: Any, method: str, argument: str, values: list[tuple[Any, str]]
) -> None:
    for value, rule in values:
        with pytest.raises(InvalidArgumentError) as refused:
            call(unreachable, method, GOOD[method] | {argument: value})
        message = str(refused.value)
        assert rule in message
        assert message.startswith(argument.removesuffix("s"))
        assert len(message) < 300


def test_each_argument_of_each_operation_has_its_refusals() -> None:
    """So that a new argument cannot be forgotten here."""
    operations = {
        name: set(inspect.signature(value.build).parameters) - {"self"}
        for name, value in vars(SessionOperations).items()
        if hasattr(value, "build")
    }
    claim = set(inspect.signature(SessionStore.claim).parameters) - {"self"}
    assert {name: set(arguments) for name, arguments in BAD.items()} == {
        name: parameters - SWITCHES for name, parameters in (operations | {"claim": claim}).items()
    }


@pytest.mark.parametrize("method", sorted(GOOD))
def test_a_good_call_is_sent(unreachable: Any, method: str) -> None:
    """The control: here it fails because nobody listens."""
    with pytest.raises(redis.RedisError):
        list(call(unreachable, method, dict(GOOD[method])))  # an iterator asks when it is asked


@pytest.mark.parametrize(
    ("status", "rule"), [*STATUS, ("busy", "must be another than busy")], ids=repr
)
def test_a_lease_cannot_be_released_with_a_bad_status(
    store: Any, world: Any, status: Any, rule: str
) -> None:
    session_id = store.create_session("claude", "s", "/src").id
    lease = store.claim(session_id)
    before = world.redis.hgetall(world.session(session_id))
    with pytest.raises(InvalidArgumentError, match=rf"^status {rule}"):
        lease.release(status=status)
    assert world.redis.hgetall(world.session(session_id)) == before
    assert not lease.released


def test_a_callback_that_is_no_function_is_refused(store: Any) -> None:
    lease = store.claim(store.create_session("claude", "s", "/src").id)
    with pytest.raises(InvalidArgumentError, match=r"^callback must be a function"):
        lease.on_lost("call me")


#: argument of a reaper → (bad value, what the message says)
BAD_REAPERS: dict[str, list[tuple[Any, str]]] = {
    "every": [
        *SECONDS,
        (None, "must be seconds, not NoneType"),
        (0, "must be 0.01 to 86400 seconds"),
        (86_401, "must be 0.01 to 86400 seconds"),
    ],
    "idle_for": SECONDS,
    "ended_for": SECONDS,
    "on_reaped": [("print", "must be a function of a Reaped")],
}


@pytest.mark.parametrize("reaper", [Reaper, AsyncReaper])
@pytest.mark.parametrize(
    ("argument", "value", "rule"),
    [(name, *bad) for name, several in BAD_REAPERS.items() for bad in several],
)
def test_a_bad_argument_of_a_reaper_is_named(
    unreachable: Any, reaper: type[Any], argument: str, value: Any, rule: str
) -> None:
    with pytest.raises(InvalidArgumentError, match=rf"^{argument} {re.escape(rule)}"):
        reaper(unreachable, **{argument: value})


@pytest.mark.parametrize("reaper", [Reaper, AsyncReaper])
def test_each_argument_of_a_reaper_has_its_refusals(reaper: type[Any]) -> None:
    assert set(inspect.signature(reaper).parameters) - {"store"} == set(BAD_REAPERS)


def test_a_refusal_is_a_value_error_and_an_error_of_the_store(unreachable: Any) -> None:
    with pytest.raises(ValueError, match="session_id") as refused:
        unreachable.get_session("")
    assert isinstance(refused.value, SessionStoreError)
    assert (refused.value.code, refused.value.argument) == ("INVALID_ARGUMENT", "session_id")


def test_a_refused_call_leaves_no_key(world: Any) -> None:
    store = world.store()
    for method, arguments in BAD.items():
        for argument, values in arguments.items():
            with pytest.raises(InvalidArgumentError):
                call(store, method, GOOD[method] | {argument: values[0][0]})
    assert world.keys() == set()


# ---- Types that a store accepts ----------------------------------------------------------------


def test_any_type_is_accepted_unless_told_otherwise(store: Any) -> None:
    for type in ("a", "claude", "my-agent_2", "x" * 32):
        assert store.create_session(type, "s", "/src").type == type


def test_a_type_that_is_not_accepted_is_refused_with_those_that_are(world: Any) -> None:
    store = world.store(types={"codex", "claude"})
    assert store.create_session("claude", "s", "/src").type == "claude"
    with pytest.raises(UnknownSessionTypeError, match=r"'gemini'.*claude, codex") as refused:
        store.create_session("gemini", "s", "/src")
    assert refused.value.code == "UNKNOWN_SESSION_TYPE"
    assert isinstance(refused.value, InvalidArgumentError)
    assert len(store.get_all_sessions()) == 1


def test_sessions_of_a_type_that_is_not_accepted_can_still_be_found(world: Any) -> None:
    session = world.store().create_session("gemini", "s", "/src")
    store = world.store(types={"claude"})
    assert [s.id for s in store.get_sessions_by_type("gemini")] == [session.id]
    assert [s.id for s in store.find_sessions(type="gemini")] == [session.id]


# ---- What only looks bad -----------------------------------------------------------------------

ODD_IDS = [
    "a", " ", "x" * 512, "漢" * 512, "a:b", "{tag}", "*", "%s %(x)s", "../..", "'\"\\", "😀", "é",
    "__proto__", "sessions", "0", "-1", "nan", "None",
]  # fmt: skip


def test_odd_ids_are_kept_apart_and_found_again(world: Any, store: Any) -> None:
    created = {odd: store.create_session("claude", odd, odd, odd, odd).id for odd in ODD_IDS}
    for odd, session_id in created.items():
        session = store.get_session(session_id)
        found = {session.service_session_id, session.project_path, session.task_id}
        assert found | {session.mcp_session_id} == {odd}
        assert store.find_session_by_service_id(odd).id == session_id
        for name in ("task_id", "mcp_session_id", "service_session_id"):
            assert [s.id for s in store.find_sessions(**{name: odd})] == [session_id]
        assert store.find_session(odd) is None
        assert store.delete_session(odd) is False
    for session_id in created.values():
        store.delete_session(session_id)
    assert {key.split(":")[0] for key in world.keys()} == {"meta", "events", "lane"}  # noqa: SIM118


def test_composed_and_decomposed_characters_are_different_ids(store: Any) -> None:
    composed, decomposed = "\u00e9", "e\u0301"
    store.create_session("claude", composed, "/src")
    assert store.find_session_by_service_id(decomposed) is None


def test_a_path_may_have_4096_characters(store: Any) -> None:
    path = "/" + "x" * 4095
    assert store.get_session(store.create_session("claude", "s", path).id).project_path == path


def test_every_good_call_works_on_a_server(store: Any) -> None:
    """So that the table above tests what it says."""
    session_id = store.create_session("claude", "s", "/src").id
    for method, arguments in GOOD.items():
        if method != "delete_session":
            own = {"session_id": session_id} if "session_id" in arguments else {}
            call(store, method, arguments | own)


class Status(str, Enum):  # noqa: UP042  formats otherwise than a StrEnum
    """What callers may have: it formats as ``Status.BUSY``."""

    ACTIVE = "active"
    BUSY = "busy"


class Name(str, Enum):  # noqa: UP042
    CLAUDE = "claude"
    SERVICE = "service-1"


def test_members_of_enumerations_are_taken_as_the_strings_they_are(store: Any) -> None:
    session = store.create_session(
        Name.CLAUDE, Name.SERVICE, "/src", Name.SERVICE, Name.SERVICE, status=Status.ACTIVE
    )
    store.update_status(session.id, Status.BUSY, expected=Status.ACTIVE)
    store.update_metadata(session.id, {Name.CLAUDE: Name.SERVICE})
    assert session.id.startswith("agent_claude_")
    assert store.get_metrics().sessions_by_type == {"claude": 1}
    assert store.get_metrics().busy_sessions == 1
    for filters in ({"status": Status.BUSY}, {"type": Name.CLAUDE}, {"task_id": Name.SERVICE}):
        (found,) = store.find_sessions(**filters)
        assert (found.status, found.metadata) == ("busy", {"claude": "service-1"})
