"""Buffers: pages with absolute cursors, bounds, and not one entry forgotten silently."""

from __future__ import annotations

import random
from typing import Any

import pytest
from consistency import assert_consistent

from sessionstore import InvalidArgumentError, SessionNotFoundError

MIB = 1024 * 1024
OVERHEAD = 16  # bytes counted for an entry beside its text


def create(store: Any, **options: Any) -> str:
    return str(store.create_session("claude", "service-1", "/src", **options).id)


def length(world: Any, session_id: str) -> int:
    return int(world.redis.llen(world.session(session_id, ":output")))


BUFFERS = {"output": ("add_output", "read_output"), "errors": ("add_error", "read_errors")}


# ---- Pages -------------------------------------------------------------------------------------


@pytest.mark.parametrize("buffer", sorted(BUFFERS))
@pytest.mark.parametrize("limit", [1, 3, 10, 11, 1000])
def test_pages_follow_each_other_without_gap_or_repeat(store: Any, buffer: str, limit: int) -> None:
    add, read = (getattr(store, name) for name in BUFFERS[buffer])
    session_id = create(store)
    entries = [f"line {i}" for i in range(10)]
    add(session_id, *entries)
    found: list[str] = []
    for _ in range(10):
        page = read(session_id, len(found), limit)
        assert len(page.chunks) == min(limit, 10 - len(found))
        found += page.chunks
        assert (page.cursor, page.dropped, page.lost, page.ended) == (len(found), 0, 0, False)
        if len(found) == 10:
            break
    assert found == entries


def test_the_two_buffers_have_cursors_of_their_own(store: Any) -> None:
    session_id = create(store)
    store.add_output(session_id, "o1", "o2", "o3")
    store.add_error(session_id, "e1")
    assert store.read_output(session_id, 2).chunks == ("o3",)
    assert store.read_errors(session_id).chunks == ("e1",)
    assert store.read_errors(session_id).cursor == 1


def test_a_page_at_the_end_is_empty_until_more_is_added(store: Any) -> None:
    session_id = create(store)
    page = store.read_output(session_id)
    assert (page.chunks, page.cursor) == ((), 0)
    store.add_output(session_id, "a")
    page = store.read_output(session_id, page.cursor)
    assert (page.chunks, page.cursor) == (("a",), 1)
    assert store.read_output(session_id, page.cursor).chunks == ()


def test_a_page_has_at_most_1000_entries_by_default(store: Any) -> None:
    session_id = create(store)
    store.add_output(session_id, *map(str, range(1500)))
    page = store.read_output(session_id)
    assert (len(page.chunks), page.cursor) == (1000, 1000)
    assert store.read_output(session_id, 1000).cursor == 1500


def test_a_cursor_beyond_the_end_tells_how_much_was_lost(store: Any) -> None:
    session_id = create(store)
    store.add_output(session_id, "a", "b")
    page = store.read_output(session_id, 7)
    assert (page.chunks, page.cursor, page.lost, page.dropped) == ((), 2, 5, 0)


@pytest.mark.parametrize("status", ["terminated", "error"])
def test_a_page_that_reaches_the_end_of_an_ended_session_says_so(store: Any, status: str) -> None:
    session_id = create(store)
    store.add_output(session_id, "a", "b")
    assert not store.read_output(session_id).ended
    store.update_status(session_id, status)
    assert not store.read_output(session_id, 0, 1).ended
    assert store.read_output(session_id, 0, 2).ended
    assert store.read_output(session_id, 2).ended
    store.update_status(session_id, "active")
    assert not store.read_output(session_id, 2).ended


def test_a_deleted_session_has_no_pages(store: Any) -> None:
    session_id = create(store)
    store.add_output(session_id, "a")
    store.delete_session(session_id)
    with pytest.raises(SessionNotFoundError):
        store.read_output(session_id, 1)


@pytest.mark.parametrize(
    "sizes",
    [
        [300_000] * 7,
        [MIB] * 3,
        [MIB // 2] * 5,  # two fill a page exactly
        [MIB // 2, MIB // 2 + 1, 1, MIB - 1, 1, 1],
        [1] * 500 + [MIB] + [1] * 500,
        [MIB] + [0] * 20 + [MIB],
        [700_000, *[10] * 2500, 900_000, 900_000],
    ],
    ids=["even", "one-each", "exact", "edges", "one-large", "empty-ones", "mixed"],
)
def test_a_page_ends_at_one_mebibyte(store: Any, sizes: list[int]) -> None:
    session_id = create(store)
    entries = [chr(97 + i % 26) * size for i, size in enumerate(sizes)]
    for first in range(0, len(entries), 500):
        store.add_output(session_id, *entries[first : first + 500])
    found: list[str] = []
    while len(found) < len(entries):
        chunks = store.read_output(session_id, len(found)).chunks
        found += chunks
        size = sum(map(len, chunks))
        assert size <= MIB
        following = sizes[len(found) : len(found) + 1]
        is_full = size == MIB or len(chunks) == 1000
        assert is_full or not following or size + following[0] > MIB
    assert found == entries or pytest.fail("the entries differ")


def test_an_entry_larger_than_a_page_is_a_page_of_its_own(world: Any) -> None:
    store = world.store(chunk_limit=2 * MIB)
    session_id = create(store)
    entries = ["before", "x" * (MIB + 1), "after"]
    store.add_output(session_id, *entries)
    found = [store.read_output(session_id, cursor) for cursor in range(len(entries))]
    assert [page.chunks for page in found] == [(entry,) for entry in entries]


# ---- Bounds ------------------------------------------------------------------------------------


class Bounded:
    """A bounded buffer in plain Python."""

    def __init__(self, limit: int, most_bytes: int) -> None:
        self.limit, self.most_bytes = limit, most_bytes
        self.entries: list[str] = []
        self.total = 0

    @property
    def bytes(self) -> int:
        return sum(len(entry.encode()) + OVERHEAD for entry in self.entries)

    def add(self, chunks: list[str]) -> None:
        self.entries += chunks
        self.total += len(chunks)
        while len(self.entries) > 1 and (
            (self.limit and len(self.entries) > self.limit)
            or (self.most_bytes and self.bytes > self.most_bytes)
        ):
            del self.entries[0]


@pytest.mark.parametrize(
    ("limit", "most_bytes"),
    [(0, 0), (1, 0), (7, 0), (0, 1), (0, 300), (7, 300), (20, 300), (3, 100_000)],
)
def test_bounds_and_dropped_are_exact_after_random_appends(
    world: Any, limit: int, most_bytes: int
) -> None:
    rng = random.Random(limit * 1000 + most_bytes)
    store = world.store(buffer_limit=limit, buffer_bytes=most_bytes)
    session_id = create(store)
    model = Bounded(limit, most_bytes)
    letters = ["", "a", "é", "漢", "😀", "0123456789", "\n", "\x00"]
    for _ in range(25 if world.target == "fakeredis" else 60):
        chunks = ["".join(rng.choices(letters, k=rng.randrange(12)))
                  for _ in range(rng.randint(1, 9))]  # fmt: skip
        assert store.add_output(session_id, *chunks) == model.total + len(chunks)
        model.add(chunks)
        oldest = model.total - len(model.entries)
        cursor = rng.randint(0, model.total)
        page = store.read_output(session_id, cursor)
        assert list(page.chunks) == model.entries[max(0, cursor - oldest) :]
        assert page.dropped == max(0, oldest - cursor)
        assert (page.cursor, page.lost) == (model.total, 0)
    session = store.get_session(session_id)
    assert session.output_buffer == tuple(model.entries)
    assert session.output_total == model.total
    held = int(world.redis.hget(world.session(session_id), "output_bytes"))
    assert held == model.bytes
    assert_consistent(world)


def test_the_newest_entry_stays_even_if_it_alone_is_over_the_bound(world: Any) -> None:
    store = world.store(buffer_bytes=100)
    session_id = create(store)
    store.add_output(session_id, "small", "x" * 1000)
    assert store.get_session(session_id).output_buffer == ("x" * 1000,)
    store.add_output(session_id, "small again")
    assert store.get_session(session_id).output_buffer == ("small again",)


def test_each_buffer_has_bounds_of_its_own(world: Any) -> None:
    store = world.store(buffer_limit=2)
    session_id = create(store)
    store.add_output(session_id, "1", "2", "3")
    store.add_error(session_id, "e")
    session = store.get_session(session_id)
    assert (session.output_buffer, session.error_buffer) == (("2", "3"), ("e",))


def test_one_append_trims_at_most_1000_entries_more_than_it_adds_by_count(world: Any) -> None:
    """So that no append blocks the server for long when a bound is lowered."""
    session_id = create(world.store())
    world.store().add_output(session_id, *["x"] * 3000)
    bounded = world.store(buffer_limit=10)
    bounded.add_output(session_id, "y")
    assert length(world, session_id) == 2000
    bounded.add_output(session_id, "y", "y")
    assert length(world, session_id) == 1000
    page = bounded.read_output(session_id)
    assert (page.dropped, page.cursor) == (2003, 3003)
    bounded.add_output(session_id, "z")
    assert length(world, session_id) == 10
    assert_consistent(world)


def test_one_append_trims_at_most_1000_entries_more_than_it_adds_by_bytes(world: Any) -> None:
    session_id = create(world.store())
    world.store().add_output(session_id, *["x"] * 3000)
    bounded = world.store(buffer_bytes=10 * (1 + OVERHEAD))
    bounded.add_output(session_id, "y")
    assert length(world, session_id) == 2000
    bounded.add_output(session_id, "y")
    bounded.add_output(session_id, "z")
    assert length(world, session_id) == 10
    assert bounded.read_output(session_id).dropped == 2993
    assert_consistent(world)


def test_by_default_a_buffer_keeps_10000_entries(world: Any, store: Any) -> None:
    session_id = create(store)
    store.add_output(session_id, *map(str, range(10_000)))
    assert length(world, session_id) == 10_000
    store.add_output(session_id, "one more")
    assert length(world, session_id) == 10_000
    assert store.read_output(session_id, 0, 1).chunks == ("1",)


def test_by_default_a_buffer_keeps_eight_mebibytes(world: Any, store: Any) -> None:
    session_id = create(store)
    chunk = "x" * (MIB - OVERHEAD)
    store.add_output(session_id, *[chunk] * 8)
    assert length(world, session_id) == 8
    store.add_output(session_id, "")
    assert length(world, session_id) == 8
    assert store.read_output(session_id, 0, 1).dropped == 1


# ---- Chunks ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "chunk", ["", " ", "\n", "a\r\nb", "\x00", "\x1b[31mred\x1b[0m", "漢字 é 😀", "\u2028", "null"]
)
def test_text_comes_back_as_it_was(store: Any, chunk: str) -> None:
    session_id = create(store)
    store.add_output(session_id, chunk, chunk.encode(), bytearray(chunk.encode()))
    assert store.get_session(session_id).output_buffer == (chunk,) * 3
    assert store.read_output(session_id).chunks == (chunk,) * 3


@pytest.mark.parametrize(
    ("chunk", "stored"),
    [
        (b"\xff", "\ufffd"),
        (b"caf\xe9!", "caf\ufffd!"),
        (b"\xed\xa0\x80", "\ufffd\ufffd\ufffd"),  # a surrogate
        (b"\xe6\xbc", "\ufffd"),  # a character cut in two
    ],
)
def test_bytes_that_are_not_utf8_are_replaced_and_not_lost(
    world: Any, store: Any, chunk: bytes, stored: str
) -> None:
    session_id = create(store)
    store.add_output(session_id, b"before", chunk, b"after")
    assert store.get_session(session_id).output_buffer == ("before", stored, "after")
    assert_consistent(world)


def test_10000_chunks_are_added_in_one_call(store: Any) -> None:
    session_id = create(store)
    entries = [f"{i}" for i in range(10_000)]
    assert store.add_error(session_id, *entries) == 10_000
    assert store.get_session(session_id).error_buffer == tuple(entries)


def test_a_chunk_of_exactly_the_limit_is_taken(world: Any) -> None:
    store = world.store(chunk_limit=6)
    session_id = create(store)
    assert store.add_output(session_id, "123456", "éée", b"\xff\xff") == 3


@pytest.mark.parametrize("chunk", ["1234567", "éé12é", b"\xff\xff\xff"])
def test_if_one_chunk_is_over_the_limit_none_of_the_call_is_added(
    world: Any, chunk: str | bytes
) -> None:
    store = world.store(chunk_limit=6)
    session_id = create(store)
    with pytest.raises(InvalidArgumentError, match="over the limit of 6"):
        store.add_output(session_id, "before", chunk, "after")
    assert store.get_session(session_id).output_total == 0


@pytest.mark.parametrize("buffer", sorted(BUFFERS))
def test_redact_sees_every_chunk_before_it_leaves(world: Any, buffer: str) -> None:
    seen: list[str] = []

    def redact(chunk: str) -> str:
        seen.append(chunk)
        return chunk.replace("secret", "***")

    store = world.store(redact=redact)
    session_id = create(store)
    add, read = (getattr(store, name) for name in BUFFERS[buffer])
    add(session_id, "a secret", b"secret \xff", "plain")
    assert read(session_id).chunks == ("a ***", "*** \ufffd", "plain")
    assert seen == ["a secret", "secret \ufffd", "plain"]


def test_the_limit_is_for_what_redact_returns(world: Any) -> None:
    store = world.store(chunk_limit=10, redact=lambda chunk: chunk[:10])
    session_id = create(store)
    store.add_output(session_id, "0123456789 and more")
    assert store.get_session(session_id).output_buffer == ("0123456789",)
