"""A session's metadata: the caller's own string fields."""

from __future__ import annotations

from typing import Any

import pytest

from sessionstore import MetadataLimitError

FULL = {f"name-{i}": str(i) for i in range(64)}


@pytest.fixture
def session_id(store: Any) -> str:
    return str(store.create_session("claude", "service-1", "/src").id)


def metadata(store: Any, session_id: str) -> dict[str, str]:
    found: dict[str, str] = store.get_session(session_id).metadata
    assert store.get_session(session_id, tail=0).metadata == found
    assert store.find_sessions()[0].metadata == found
    return found


def test_fields_are_set_changed_and_removed(store: Any, session_id: str) -> None:
    assert store.update_metadata(session_id, {"branch": "main", "pid": "42"}) is None
    assert metadata(store, session_id) == {"branch": "main", "pid": "42"}
    store.update_metadata(session_id, {"branch": "dev", "pid": None, "cost": "0.1"})
    assert metadata(store, session_id) == {"branch": "dev", "cost": "0.1"}


@pytest.mark.parametrize("change", [{}, {"never-set": None}])
def test_a_change_of_nothing_changes_nothing(
    store: Any, session_id: str, change: dict[str, Any]
) -> None:
    store.update_metadata(session_id, {"a": "b"})
    store.update_metadata(session_id, change)
    assert metadata(store, session_id) == {"a": "b"}


@pytest.mark.parametrize("value", ["", " ", "\x00\n\x1b[31m", "漢字 😀", "x" * 4096, "é" * 2048])
def test_a_value_comes_back_as_it_was(store: Any, session_id: str, value: str) -> None:
    store.update_metadata(session_id, {"A.name_like-this9": value})
    assert metadata(store, session_id) == {"A.name_like-this9": value}


@pytest.mark.parametrize("name", ["status", "id", "output_total", "meta", "type"])
def test_a_name_does_not_touch_the_sessions_own_fields(
    store: Any, session_id: str, name: str
) -> None:
    before = store.get_session(session_id)
    store.update_metadata(session_id, {name: "mine"})
    after = store.get_session(session_id)
    assert after.metadata == {name: "mine"}
    changed = {"metadata": {}, "read_at": before.read_at}
    assert after.model_copy(update=changed) == before


def test_metadata_is_not_activity(store: Any, session_id: str) -> None:
    before = store.get_session(session_id).last_activity
    store.update_metadata(session_id, {"a": "b"})
    assert store.get_session(session_id).last_activity == before


def test_64_names_are_the_limit_and_a_refusal_changes_nothing(store: Any, session_id: str) -> None:
    store.update_metadata(session_id, FULL)
    with pytest.raises(MetadataLimitError, match="64") as refused:
        store.update_metadata(session_id, {"name-0": "changed", "one-more": ""})
    assert (refused.value.session_id, refused.value.limit) == (session_id, 64)
    assert metadata(store, session_id) == FULL


def test_at_the_limit_names_can_be_changed_removed_and_replaced(
    store: Any, session_id: str
) -> None:
    store.update_metadata(session_id, FULL)
    store.update_metadata(session_id, {"name-0": "changed"})
    store.update_metadata(session_id, {"name-1": None, "another": "x"})
    expected = FULL | {"name-0": "changed", "another": "x"}
    del expected["name-1"]
    assert metadata(store, session_id) == expected


def test_removing_a_name_that_is_not_there_makes_no_room(store: Any, session_id: str) -> None:
    store.update_metadata(session_id, FULL)
    with pytest.raises(MetadataLimitError):
        store.update_metadata(session_id, {"one-more": "", "never-set": None})
    assert metadata(store, session_id) == FULL


def test_a_session_may_be_created_with_64_names(store: Any) -> None:
    session = store.create_session("claude", "service-2", "/src", metadata=FULL)
    assert store.get_session(session.id).metadata == FULL
