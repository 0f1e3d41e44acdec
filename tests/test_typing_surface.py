"""What editors, documentation tools and checkers see of the two stores at run time.

What type checkers infer is in ``typed_calls.py``.
"""

from __future__ import annotations

import inspect
import os
import pickle
import re
import socket
from collections.abc import Iterator
from pathlib import Path
from pydoc import plain, render_doc
from typing import Any, get_type_hints
from unittest.mock import create_autospec

import pytest

import sessionstore
from sessionstore import (
    AgentSession,
    AsyncBatch,
    AsyncLease,
    AsyncReaper,
    AsyncSessionStore,
    AsyncWriter,
    Batch,
    Lease,
    Outcome,
    Reaper,
    SessionStore,
    Writer,
)
from sessionstore._operation import operation
from sessionstore.operations import SessionOperations
from sessionstore.testing import async_memory_store, memory_store

ORIGINAL = [
    "create_session",
    "get_session",
    "find_session",
    "find_session_by_service_id",
    "update_status",
    "update_activity",
    "add_output",
    "add_error",
    "delete_session",
    "get_all_sessions",
    "get_sessions_by_type",
    "get_metrics",
]
#: Blocking and asynchronous, of the same names.
PAIRS = [
    (SessionStore, AsyncSessionStore),
    (Lease, AsyncLease),
    (Reaper, AsyncReaper),
    (Batch, AsyncBatch),
]
HOW_REQUESTS_TRAVEL = {"carry"}
OPERATIONS = [
    name for name, value in vars(SessionOperations).items() if isinstance(value, operation)
]


@pytest.fixture
def store() -> Iterator[SessionStore]:
    with memory_store() as opened:
        yield opened


@pytest.fixture
def async_store() -> AsyncSessionStore:
    return async_memory_store()  # never contacts anything, so there is nothing to close


def public(store_class: type[Any]) -> set[str]:
    return {name for name in dir(store_class) if not name.startswith("_")}


def test_the_originals_methods_come_first_and_keep_their_order() -> None:
    assert OPERATIONS[: len(ORIGINAL)] == ORIGINAL


def test_both_stores_have_the_same_public_methods() -> None:
    assert public(SessionStore) == public(AsyncSessionStore)
    assert set(OPERATIONS) < public(SessionStore)


@pytest.mark.parametrize("name", OPERATIONS)
def test_both_stores_show_the_same_signature(
    store: SessionStore, async_store: AsyncSessionStore, name: str
) -> None:
    signature = inspect.signature(getattr(store, name))
    assert signature == inspect.signature(getattr(async_store, name))
    assert "self" not in signature.parameters


@pytest.mark.parametrize("name", OPERATIONS)
def test_a_signature_tells_the_result_and_not_the_request(store: SessionStore, name: str) -> None:
    result = str(inspect.signature(getattr(store, name)).return_annotation)
    assert not any(word in result for word in ("Call", "Snapshot", "Request", "~T"))


def test_signatures_are_those_of_the_design(store: SessionStore) -> None:
    signature = inspect.signature(store.get_session)
    assert signature.return_annotation is AgentSession
    assert list(signature.parameters) == ["session_id", "tail"]
    tail = signature.parameters["tail"]
    assert (tail.kind, tail.default) == (inspect.Parameter.KEYWORD_ONLY, None)
    create = inspect.signature(store.create_session).parameters
    positional = [
        name for name, p in create.items() if p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
    ]
    assert positional == [
        "type", "service_session_id", "project_path", "task_id", "mcp_session_id"
    ]  # fmt: skip


@pytest.mark.parametrize("name", OPERATIONS)
def test_only_the_asyncio_store_has_coroutine_functions(
    store: SessionStore, async_store: AsyncSessionStore, name: str
) -> None:
    assert inspect.iscoroutinefunction(getattr(async_store, name))
    assert not inspect.iscoroutinefunction(getattr(store, name))


@pytest.mark.parametrize("name", OPERATIONS)
def test_every_method_is_documented_wherever_it_is_looked_up(
    store: SessionStore, async_store: AsyncSessionStore, name: str
) -> None:
    texts = {
        getattr(holder, name).__doc__
        for holder in (store, async_store, SessionStore, AsyncSessionStore)
    }
    (text,) = texts
    assert text
    assert text.strip()
    assert getattr(store, name).__name__ == name


@pytest.mark.parametrize("shown", [one for pair in PAIRS for one in pair] + [Writer, AsyncWriter])
def test_everything_public_is_documented(shown: type[Any]) -> None:
    undocumented = [name for name in public(shown) if not getattr(shown, name).__doc__]
    assert undocumented == []
    assert shown.__doc__


def test_a_blocking_writer_has_whatever_an_awaited_one_has() -> None:
    """And what else a text file has."""
    assert public(AsyncWriter) < public(Writer)


@pytest.mark.parametrize(("blocking", "awaited"), PAIRS)
def test_both_kinds_have_the_same_names_and_arguments(
    blocking: type[Any], awaited: type[Any]
) -> None:
    assert public(blocking) == public(awaited)
    for name in public(blocking):
        if inspect.isfunction(getattr(blocking, name)) and name not in OPERATIONS:
            ours, theirs = (
                [
                    (one.name, one.kind, one.default)
                    for one in inspect.signature(getattr(shown, name)).parameters.values()
                ]
                for shown in (blocking, awaited)
            )
            if name not in HOW_REQUESTS_TRAVEL:
                assert ours == theirs, name


def test_a_worker_has_a_readable_name(store: SessionStore) -> None:
    assert store.worker == f"{socket.gethostname()}:{os.getpid()}"
    with memory_store(worker="builder-1") as labelled:
        assert labelled.worker == f"{store.worker}:builder-1"


def test_a_lease_shows_its_session_and_its_state(store: SessionStore) -> None:
    lease = store.claim(store.create_session("claude", "s", "/src").id, ttl=60)
    shown = repr(lease)
    lease.release()
    assert re.fullmatch(rf"<Lease on {lease.session_id}, held, (60\.0|5\d\.\d) s left>", shown)
    assert repr(lease) == f"<Lease on {lease.session_id}, released>"


def test_a_method_is_the_same_object_each_time(store: SessionStore) -> None:
    assert store.get_session is store.get_session


def test_every_public_name_is_there() -> None:
    assert sorted(set(sessionstore.__all__)) == sorted(sessionstore.__all__)
    for name in sessionstore.__all__:
        assert hasattr(sessionstore, name)


def test_the_package_is_marked_as_typed() -> None:
    assert (Path(sessionstore.__file__).parent / "py.typed").exists()


def test_hints_of_the_models_can_be_resolved() -> None:
    assert get_type_hints(AgentSession)["output_buffer"] == tuple[str, ...]


def test_values_can_be_pickled(store: SessionStore) -> None:
    """So that workers can hand them to each other."""
    session = store.create_session("claude", "s", "/src", metadata={"a": "b"})
    assert pickle.loads(pickle.dumps(session)) == session
    metrics = store.get_metrics()
    assert pickle.loads(pickle.dumps(metrics)) == metrics


ERRORS = [
    value
    for value in vars(sessionstore).values()
    if isinstance(value, type) and issubclass(value, sessionstore.SessionStoreError)
]


def test_every_error_has_a_code_of_its_own() -> None:
    codes = [error.code for error in ERRORS]
    assert len(set(codes)) == len(codes) == len(ERRORS) > 10


@pytest.mark.parametrize("error", ERRORS)
def test_an_error_tells_what_its_code_says(error: type[sessionstore.SessionStoreError]) -> None:
    word = error.__name__.removesuffix("Error")
    assert error.code.replace("_", "").lower().removesuffix("error") == word.lower()
    assert error.__doc__


def test_a_subclass_may_override_an_operation() -> None:
    class Counting(SessionStore):
        calls = 0

        def update_activity(self, session_id: str) -> None:
            self.calls += 1
            super().update_activity(session_id)

    with memory_store() as original:
        store = Counting(original._client)
        session = store.create_session("claude", "service-1", "/src")
        for _ in range(3):
            store.update_activity(session.id)
        assert store.calls == 3


def test_operations_can_be_called_through_the_class() -> None:
    with memory_store() as store:
        assert SessionStore.ping(store) is True


def test_a_mock_of_the_class_knows_the_operations() -> None:
    mocked = create_autospec(SessionStore, instance=True)
    mocked.create_session("claude", "service-1", "/src")
    with pytest.raises(TypeError):
        mocked.create_session("claude")


@pytest.mark.parametrize("shown", [SessionStore, AsyncSessionStore, Batch, AsyncBatch])
def test_help_tells_of_the_operations(shown: type[Any]) -> None:
    assert "create_session(" in plain(render_doc(shown))


@pytest.mark.parametrize("name", OPERATIONS)
def test_a_batch_shows_the_stores_signatures_with_outcomes(
    store: SessionStore, async_store: AsyncSessionStore, name: str
) -> None:
    alone = inspect.signature(getattr(store, name))
    for batch in (store.batch(), async_store.batch()):
        noted = inspect.signature(getattr(batch, name))
        assert noted.parameters == alone.parameters
        assert str(noted.return_annotation).startswith("sessionstore._operation.Outcome[")
        assert getattr(batch, name).__doc__ == getattr(store, name).__doc__
        assert not inspect.iscoroutinefunction(getattr(batch, name))


def test_an_outcome_tells_what_it_is_of(store: SessionStore) -> None:
    with store.batch() as batch:
        outcome = batch.ping()
    assert isinstance(outcome, Outcome)
    assert repr(outcome) == "<ping in a batch: done>"
    assert Outcome.result.__doc__
