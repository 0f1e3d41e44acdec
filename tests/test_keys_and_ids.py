"""Key names and session ids, without a server."""

from __future__ import annotations

from uuid import RFC_4122, UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st
from redis.crc import key_slot

from sessionstore.keys import PARTITIONS, Keys, Keyspace, new_session_id
from sessionstore.testing import memory_store

KEYS = Keys("agents")
ID = "agent_claude_9bdb555d-2703-40d3-8b36-3e44786cf40f"

texts = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=30)


def every_key(keys: Keys, text: str) -> list[str]:
    """A key of each kind; ``text`` is whatever a caller may put into it."""
    fixed = [keys.sessions, keys.types, keys.activity, keys.ended, keys.leases]
    of_text = [
        keys.session, keys.output, keys.errors, keys.by_type, keys.by_status, keys.by_service,
        keys.by_task, keys.by_mcp, keys.by_owner, keys.lane,
    ]  # fmt: skip
    return [*fixed, keys.events, *(name(text) for name in of_text)]


def test_the_names_are_those_of_the_design() -> None:
    assert every_key(KEYS, "x") == [
        "{agents}:sessions",
        "{agents}:types",
        "{agents}:activity",
        "{agents}:ended",
        "{agents}:leases",
        "{agents}:events",
        "{agents}:session:x",
        "{agents}:session:x:output",
        "{agents}:session:x:errors",
        "{agents}:sessions:type:x",
        "{agents}:sessions:status:x",
        "{agents}:sessions:service:x",
        "{agents}:sessions:task:x",
        "{agents}:sessions:mcp:x",
        "{agents}:sessions:owner:x",
        "{agents}:lane:x",
    ]


@given(texts)
def test_all_keys_of_a_namespace_are_in_one_slot(text: str) -> None:
    """Whatever braces an id has: so every script is legal on Redis Cluster."""
    assert {key_slot(key.encode()) for key in every_key(KEYS, text)} == {key_slot(b"{agents}")}


@given(texts)
def test_keys_of_different_kinds_never_meet(text: str) -> None:
    keys = every_key(KEYS, text)
    assert len(set(keys)) == len(keys)


@given(texts, texts)
def test_what_is_asked_for_as_a_session_never_names_another_key(asked: str, other: str) -> None:
    names_of_other = set(every_key(KEYS, other)) - {KEYS.session(other)}
    assert KEYS.session(asked) not in names_of_other


def test_a_session_id_cannot_reach_a_buffer() -> None:
    for reaching in (f"{ID}:output", f"{ID}:errors"):
        assert KEYS.session(reaching) not in {KEYS.output(ID), KEYS.errors(ID)}


# ---- Partitions ----------------------------------------------------------------------------


def test_the_names_of_partitions() -> None:
    assert Keyspace("agents", 1).all[0].sessions == "{agents}:sessions"
    assert Keyspace("agents", 16).all[10].sessions == "{agents/aa}:sessions"
    assert Keyspace("agents", 256).all[10].sessions == "{agents/0a}:sessions"


@pytest.mark.parametrize("partitions", PARTITIONS)
def test_each_partition_has_keys_of_its_own(partitions: int) -> None:
    keyspace = Keyspace("agents", partitions)
    assert len({keys.prefix for keys in keyspace.all}) == partitions
    assert keyspace.meta == "{agents}:meta"


@pytest.mark.parametrize("partitions", PARTITIONS)
@given(service_session_id=texts)
def test_both_ids_of_a_session_tell_the_same_partition(
    partitions: int, service_session_id: str
) -> None:
    keyspace = Keyspace("agents", partitions)
    session_id = new_session_id("claude", service_session_id)
    assert keyspace.of_session(session_id) is keyspace.of_service(service_session_id)


@pytest.mark.parametrize("partitions", PARTITIONS)
@given(asked=texts)
def test_whatever_is_asked_for_is_in_a_partition(partitions: int, asked: str) -> None:
    keyspace = Keyspace("agents", partitions)
    assert keyspace.of_session(asked) in keyspace.all


@pytest.mark.parametrize("partitions", PARTITIONS)
def test_all_partitions_are_used(partitions: int) -> None:
    keyspace = Keyspace("agents", partitions)
    used = {keyspace.of_service(f"service-{n}").prefix for n in range(5000)}
    assert len(used) == partitions


# ---- Ids ---------------------------------------------------------------------------------------


def crc16(data: bytes) -> int:
    """CRC-16/XMODEM bit by bit, as Redis Cluster's specification has it."""
    crc = 0
    for byte in data:
        crc ^= byte << 8
        for _ in range(8):
            crc = (crc << 1) ^ 0x1021 if crc & 0x8000 else crc << 1
            crc &= 0xFFFF
    return crc


def test_the_control_checksum_is_right() -> None:
    assert crc16(b"123456789") == 0x31C3


@given(st.from_regex(r"[a-z][a-z0-9_-]{0,31}", fullmatch=True), texts)
def test_an_id_is_its_type_and_a_uuid_that_begins_with_the_service_sessions_checksum(
    type: str, service_session_id: str
) -> None:
    session_id = new_session_id(type, service_session_id)
    prefix = f"agent_{type}_"
    assert session_id.startswith(prefix)
    text = session_id.removeprefix(prefix)
    uuid = UUID(text)
    assert str(uuid) == text
    assert (uuid.version, uuid.variant) == (4, RFC_4122)
    assert text[:2] == f"{crc16(service_session_id.encode()) & 0xFF:02x}"


def test_ids_do_not_repeat() -> None:
    assert len({new_session_id("claude", "service-1") for _ in range(10_000)}) == 10_000


@pytest.mark.parametrize("service_session_id", ["service-1", "é", "{tag}"])
def test_a_store_gives_such_ids(service_session_id: str) -> None:
    with memory_store() as store:
        session = store.create_session("my-agent_2", service_session_id, "/src")
    digits = f"{crc16(service_session_id.encode()) & 0xFF:02x}"
    assert session.id.startswith(f"agent_my-agent_2_{digits}")
