"""Hostile text in every place that takes text: refused before anything is sent, or kept exactly.

Strings from a seed, others in each world: control characters, protocol, Lua and glob fragments,
braces and colons that imitate keys, text that is long, bidirectional, combining or no text at all.
Each is tried as service session, task and MCP id, project path, type, status, chunk, metadata name
and value, and as the id of a session that is not there. Around the namespace lie canary keys, and
nothing but the namespace may change.

Wrong is: an exception that is no refusal, a key that is not the namespace's, two ids that meet in
one key, and text that comes back as another. The control is a store that puts ids into its keys
as they are.
"""

from __future__ import annotations

import random
import string
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from enum import Enum
from typing import Any

import pytest
from conftest import World
from consistency import assert_consistent
from faults import seeded
from programme import Attack, controls, proves

from sessionstore import (
    AgentSession,
    InvalidArgumentError,
    SessionNotFoundError,
    SessionStore,
)
from sessionstore._server import PrivateServer

# ---- The strings ---------------------------------------------------------------------------------

FRAGMENTS = [
    *(
        "{",
        "}",
        "{}",
        "{{",
        "}{",
        ":",
        "::",
        "*",
        "?",
        "[a-z]",
        "[^a]",
        "\\*",
        "/",
        "//",
        ".",
        "..",
    ),
    *("\x00", "\x01", "\x07", "\x1b[2J", "\x7f", "\x85", "\x9b", "\r", "\n", "\r\n", "\t", "\v"),
    *(
        "\r\n$3\r\nDEL\r\n",
        "*1\r\n$8\r\nFLUSHALL\r\n",
        "+OK\r\n",
        "-ERR x\r\n",
        ":1\r\n",
        "$-1\r\n",
    ),
    *(
        "FLUSHALL",
        "DEL *",
        "' .. redis.call('FLUSHALL') .. '",
        "]] .. x",
        "--",
        "KEYS[1]",
        "ARGV[2]",
    ),
    *("nil", "false", "NaN", "inf", "-0", "1e400", "9" * 40, "0x7f", "null", '"', "'", "`", "\\"),
    *("%s%s%n", "{0}", "{self.__class__}", "%(x)s", "${HOME}", "$(id)", ";id", "|", "&&", "<b>"),
    *("__proto__", "constructor", "__class__", "meta:", "meta:x", "id", "status", "type", "lane:"),
    *(
        "{agents}:session:",
        "{agents}:",
        "x:output",
        ":output",
        ":errors",
        "sessions:type:",
        "events",
    ),
    *("\ud800", "\udfff", "\ud83d\ude00", "\udc80"),  # lone surrogates, and a pair that is none
    *("\u202e", "\u2066", "\u200f", "\u061c", "שלום", "مرحبا", "\u2028", "\u2029", "\ufeff"),
    *("😀", "👩‍👩‍👧‍👦", "🇺🇳", "é", "e\u0301", "\u0301" * 20, "ﷺ", "ß", "İ", "ı", "Å", "Å"),
    *(
        "%3A",
        "%253A",
        "a:b",
        "a%3Ab",
        " ",
        "  ",
        "\u00a0",
        "\u200b",
        "\u3000",
        "\U0010ffff",
        "\uffff",
    ),
    *(
        "agent_claude_",
        "agent_claude_00000000-0000-4000-8000-000000000000",
        "claude",
        "active",
        "-",
    ),
]
#: The bounds of what is accepted, and pairs that something careless would take for the same.
EDGES = [
    "",
    " ",
    "x" * 512,
    "x" * 513,
    "é" * 512,
    "😀" * 513,
    "x" * 4096,
    "x" * 4097,
    "é" * 2048,
    "é" * 2049,
    "x" * 2**20,
    "x" * (2**20 + 1),
    "Case",
    "case",
    "CASE",
    "é",
    "e\u0301",
    "a",
    "a ",
    " a",
    "a\u200b",
    "a:b",
    "a%3Ab",
    "a}:b",
    "1",
    "01",
    "1.0",
    "+1",
]


def hostile(rng: random.Random, count: int) -> list[str]:
    """So many different strings: the edges, half of them from fragments at most, the rest drawn."""
    found = dict.fromkeys(EDGES)
    found.update(dict.fromkeys(rng.sample(FRAGMENTS, min(len(FRAGMENTS), count // 2))))
    alphabets = [
        string.printable,
        string.ascii_lowercase + "{}:*?[]\\",
        "".join(map(chr, range(0x20, 0x250))),
        "".join(map(chr, range(0x590, 0x700))),
    ]
    while len(found) < count:
        if rng.random() < 0.7:
            text = "".join(rng.choices(FRAGMENTS, k=rng.randint(1, 4)))
        elif rng.random() < 0.9:
            text = "".join(rng.choices(rng.choice(alphabets), k=rng.randint(1, 30)))
        else:
            text = "".join(chr(rng.randrange(0x110000)) for _ in range(rng.randint(1, 12)))
        found[text] = None
    return list(found)[:count]


def hostile_to(world: World, count: int) -> list[str]:
    """The strings of a world: others than in the other worlds, whatever the seed."""
    name = f"{world.style}-{world.target}-{world.partitions}"
    return hostile(random.Random(f"{seeded().random()} {name}"), count)


# ---- What is not ours ----------------------------------------------------------------------------


class Canaries:
    """Keys of others around a namespace, and all that is not in it, before and after."""

    def __init__(self, world: World) -> None:
        self._client = world.client()
        namespace = world.namespace
        self._own = tuple(f"{{{namespace}{end}".encode() for end in ("}", "/"))
        names = [
            f"canary-{namespace}",
            f"{{canary-{namespace}}}:session:x",
            f"canary-{namespace}:output",
            f"{{{namespace}-2}}:sessions",
            f"{{{namespace}",
            f"{namespace}:sessions:service:x",
        ]
        client = self._client
        client.set(names[0], "x")
        client.hset(names[1], mapping={"id": "x", "status": "active"})
        client.rpush(names[2], "x", "y")
        client.zadd(names[3], {"x": 1})
        client.sadd(names[4], "x")
        client.set(names[5], "x")
        self.names = names
        self._before = self._foreign()

    def _foreign(self) -> dict[bytes, bytes]:
        found = {}
        for key in self._client.scan_iter(count=1000):
            # What expires, others have left, and it may go at any time.
            if not key.startswith(self._own) and self._client.ttl(key) < 0:
                found[key] = self._client.dump(key)
        return found

    def changed(self) -> set[bytes]:
        """The keys outside of the namespace that are not what they were, or are new."""
        before, now = self._before, self._foreign()
        assert len(before) >= len(self.names)
        return {key for key in before | now if before.get(key) != now.get(key)}

    def remove(self) -> None:
        self._client.delete(*self.names)


@pytest.fixture
def canaries(world: World) -> Iterator[Canaries]:
    placed = Canaries(world)
    yield placed
    placed.remove()


class Outcomes:
    """What became of the attempts: refused, kept, not found; and all that is wrong."""

    def __init__(self) -> None:
        self.counted: Counter[str] = Counter()
        self.wrong: list[str] = []

    def expect(self, right: bool, what: object) -> None:
        if not right:
            self.wrong.append(f"{what!r:.300}")

    def attempt(self, call: Callable[[], Any]) -> Any:
        """The call's result; None if it was refused before anything was sent."""
        try:
            result = call()
        except InvalidArgumentError:
            self.counted["refused"] += 1
            return None
        except Exception as error:
            self.wrong.append(f"crash: {error!r:.300}")
            return None
        self.counted["kept"] += 1
        return result

    def missing(self, call: Callable[[], Any]) -> None:
        """A call about a session that is not there."""
        try:
            found = call()
        except InvalidArgumentError:
            self.counted["refused"] += 1
        except SessionNotFoundError:
            self.counted["not_found"] += 1
        except Exception as error:
            self.wrong.append(f"crash: {error!r:.300}")
        else:
            self.wrong.append(f"a session that is not there: {found!r:.300}")

    def told(self, attack: Attack, strings: int, canaries: Canaries) -> None:
        self.wrong += [f"foreign key {key!r}" for key in canaries.changed()]
        print(*self.wrong[:20], sep="\n")
        attack.tell(
            injected=strings,
            wrong=len(self.wrong),
            canary_keys=len(canaries.names),
            **self.counted,
        )


ROLES: dict[str, Callable[[Any, str], AgentSession]] = {
    "service_session_id": lambda store, text: store.create_session("codex", text, "/src"),
    "task_id": lambda store, text: store.create_session("codex", "-", "/src", text),
    "mcp_session_id": lambda store, text: store.create_session("codex", "-", "/src", None, text),
    "project_path": lambda store, text: store.create_session("codex", "-", text),
    "type": lambda store, text: store.create_session(text, "-", "/src"),
    "status": lambda store, text: store.create_session("codex", "-", "/src", status=text),
}


@proves("hostile strings", ordinary=120, full=2_500)
def test_hostile_text_is_refused_or_kept_exactly(
    world: World, canaries: Canaries, attack: Attack
) -> None:
    store, outcomes = world.store(), Outcomes()
    texts = hostile_to(world, attack.size)
    created: dict[str, dict[str, str]] = {role: {} for role in ROLES}
    for text in texts:
        for role, create in ROLES.items():
            session = outcomes.attempt(lambda create=create, text=text: create(store, text))
            if session is not None:
                outcomes.expect(getattr(session, role) == text, (role, text))
                created[role][text] = session.id

    assert outcomes.counted["refused"] > len(texts)
    assert outcomes.counted["kept"] > len(texts)
    by_id = {one.id: one for one in store.iter_sessions()}
    for role, ids in created.items():
        for text, own in ids.items():
            outcomes.expect(own in by_id and getattr(by_id[own], role) == text, (role, text))
    assert len(by_id) == sum(map(len, created.values()))
    assert_consistent(world)
    outcomes.told(attack, len(texts), canaries)


@proves("hostile strings", ordinary=120, full=2_500)
def test_different_ids_never_meet_in_an_index(
    world: World, canaries: Canaries, attack: Attack
) -> None:
    store, outcomes = world.store(), Outcomes()
    texts = hostile_to(world, attack.size)
    created: dict[str, str] = {}
    for text in texts:
        session = outcomes.attempt(
            lambda text=text: store.create_session("codex", text, "/src", text, text)
        )
        if session is not None:
            created[text] = session.id
    assert len(created) > 30
    keys = world.keys()
    for name in ("service", "task", "mcp"):
        index = f"sessions:{name}:"
        found = {key for key in keys if key.startswith(index)}
        for key in found ^ {index + text for text in created}:
            outcomes.expect(False, f"a key too many or too few: {key}")
    for text, own in created.items():
        outcomes.expect(store.find_session_by_service_id(text, tail=0).id == own, text)
        outcomes.expect([one.id for one in store.find_sessions(task_id=text)] == [own], text)
        outcomes.expect([one.id for one in store.find_sessions(mcp_session_id=text)] == [own], text)
    outcomes.told(attack, len(texts), canaries)


@proves("hostile strings", ordinary=120, full=2_500)
def test_hostile_text_in_buffers_and_metadata_is_refused_or_kept_exactly(
    world: World, canaries: Canaries, attack: Attack
) -> None:
    store, outcomes = world.store(buffer_bytes=0), Outcomes()
    own = store.create_session("claude", "s", "/src").id
    texts = hostile_to(world, attack.size)
    lines: list[str] = []
    values: dict[str, str] = {}
    names: list[str] = []

    def accepted(call: Callable[[], Any]) -> bool:
        before = outcomes.counted["kept"]
        outcomes.attempt(call)
        return outcomes.counted["kept"] > before

    for number, text in enumerate(texts):
        if accepted(lambda text=text: store.add_output(own, text)):
            lines.append(text)
        update = {f"n{number % 60}": text}
        if accepted(lambda update=update: store.update_metadata(own, update)):
            values |= update
        named = {text: f"value of {number}"}
        if accepted(lambda named=named: store.update_metadata(own, named)):
            names.append(text)
            found = store.get_session(own, tail=0).metadata
            outcomes.expect(found == values | named, f"metadata with the name {text!r}")
            values.pop(text, None)
            store.update_metadata(own, {text: None})

    session = store.get_session(own)
    assert len(session.output_buffer) == len(lines) > 50
    for stored, line in zip(session.output_buffer, lines, strict=True):
        outcomes.expect(stored == line, line)
    outcomes.expect(session.metadata == values, "metadata")
    outcomes.expect(store.get_session(own, tail=3).output_buffer == tuple(lines[-3:]), "a tail")
    assert names
    assert all(set(name) <= set(string.ascii_letters + string.digits + "_.-") for name in names)
    assert_consistent(world)
    outcomes.told(attack, len(texts), canaries)


def test_hostile_bytes_are_kept_as_what_utf8_makes_of_them(world: World) -> None:
    store, rng = world.store(), seeded()
    own = store.create_session("claude", "s", "/src").id
    chunks = [rng.randbytes(rng.randint(0, 40)) for _ in range(300)]
    chunks += [text.encode(errors="surrogatepass") for text in FRAGMENTS]
    assert store.add_output(own, *chunks) == len(chunks)
    assert store.get_session(own).output_buffer == tuple(
        chunk.decode(errors="replace") for chunk in chunks
    )


ABOUT_A_SESSION: dict[str, Callable[[Any, str], Any]] = {
    "get_session": lambda store, text: store.get_session(text),
    "get_session, tail=0": lambda store, text: store.get_session(text, tail=0),
    "add_output": lambda store, text: store.add_output(text, "x"),
    "add_error": lambda store, text: store.add_error(text, "x"),
    "update_status": lambda store, text: store.update_status(text, "busy"),
    "update_activity": lambda store, text: store.update_activity(text),
    "update_metadata": lambda store, text: store.update_metadata(text, {"a": "b"}),
    "claim": lambda store, text: store.claim(text),
    "update_status, force": lambda store, text: store.update_status(text, "active", force=True),
    "read_output": lambda store, text: store.read_output(text),
    "read_errors": lambda store, text: store.read_errors(text),
}


@proves("hostile strings", ordinary=120, full=2_500)
def test_a_hostile_id_finds_no_session_and_touches_nothing(
    world: World, canaries: Canaries, attack: Attack
) -> None:
    store, outcomes = world.store(), Outcomes()
    own = store.create_session("claude", "s", "/src").id
    store.add_output(own, "line")
    before = world.keys()
    imitations = [f"{own}{tail}" for tail in (":output", ":errors", "%3Aoutput", " ", "}", "\x00")]
    imitations += [f"session:{own}", own.upper(), own[:-1], f"../{own}", f"{world.namespace}:{own}"]
    texts = imitations + hostile_to(world, attack.size)
    for text in texts:
        for call in ABOUT_A_SESSION.values():
            outcomes.missing(lambda call=call, text=text: call(store, text))
        found = outcomes.attempt(lambda text=text: store.find_session(text))
        outcomes.expect(found is None, text)
        for force in (False, True):
            deleted = outcomes.attempt(
                lambda text=text, force=force: store.delete_session(text, force=force)
            )
            outcomes.expect(not deleted, text)

    assert outcomes.counted["not_found"] > 100
    assert outcomes.counted["refused"] > 100
    for key in world.keys() - before:
        outcomes.expect(key.startswith("lane:"), f"a new key: {key}")
    outcomes.expect(store.get_session(own).output_buffer == ("line",), "the session's output")
    assert_consistent(world)
    outcomes.told(attack, len(texts), canaries)


class Unchecked:
    """A store that takes ids as they come, and makes its keys of them."""

    def __init__(self, client: Any) -> None:
        self._client = client

    def create(self, session_id: str) -> None:
        self._client.hset(session_id, mapping={"id": session_id, "status": "active"})

    def add_output(self, session_id: str, line: str) -> None:
        self._client.rpush(f"{session_id}:output", line)

    def output(self, session_id: str) -> list[str]:
        found: list[str] = self._client.lrange(f"{session_id}:output", 0, -1)
        return found


@controls("hostile strings", ordinary=120, full=2_500)
def test_keys_of_unchecked_ids_collide_and_reach_the_keys_of_others(
    server: PrivateServer, attack: Attack
) -> None:
    with closing(World("sync", server.program.name.lower(), server.url)) as world:
        canaries, outcomes = Canaries(world), Outcomes()
        names = [*canaries.names, f"canary-{world.namespace}"]
        # In this world's namespace, so that what it makes can be removed; but for others' keys.
        own = [f"{world.prefix}{text}" for text in hostile_to(world, attack.size)]
        store = Unchecked(world.redis)
        for text in (*names, *own):
            outcomes.attempt(lambda text=text: store.create(text))
            outcomes.attempt(lambda text=text: store.add_output(text, f"line of {text}"))
        for text in own:
            output = outcomes.attempt(lambda text=text: store.output(text))
            outcomes.expect(output == [f"line of {text}"], f"the output of {text}")
        foreign = canaries.changed()
        outcomes.told(attack, len(own), canaries)
        canaries.remove()
        world.redis.delete(*foreign)
        assert foreign


def test_what_is_refused_is_refused_before_anything_is_sent(server: PrivateServer) -> None:
    with closing(World("sync", server.program.name.lower(), server.url)) as world:
        _assert_nothing_is_sent(world)


def _assert_nothing_is_sent(world: World) -> None:
    client = Noting(world.client())
    store = SessionStore(client, namespace=world.namespace)  # type: ignore[arg-type]
    own = store.create_session("claude", "s", "/src").id
    outcomes = Outcomes()
    calls: list[Callable[[Any, str], Any]] = [
        *ROLES.values(),
        *ABOUT_A_SESSION.values(),
        lambda store, text: store.add_output(own, text),
        lambda store, text: store.update_metadata(own, {text: "x"}),
        lambda store, text: store.update_metadata(own, {"x": text}),
        lambda store, text: store.find_session_by_service_id(text),
        lambda store, text: store.find_sessions(type=text),
        lambda store, text: store.find_sessions(status=text),
        lambda store, text: store.find_sessions(task_id=text),
        lambda store, text: store.iter_sessions(owner=text),
        lambda store, text: store.claim(own, expected=text),
        lambda store, text: store.delete_session(text),
    ]
    for text in ("\x00", "a\r\nb", "\ud800", "x" * (2**20 + 1), "", "\u2028"):
        for call in calls:
            client.sent = 0
            before = outcomes.counted["refused"]
            try:
                outcomes.attempt(lambda call=call, text=text: call(store, text))
            except SessionNotFoundError:
                raise AssertionError("it was sent") from None
            assert (client.sent == 0) == (outcomes.counted["refused"] > before)
    # All but the chunks and metadata values that may hold such text, and project paths of 1 MiB.
    assert outcomes.counted["refused"] > 100


class Noting:
    """A client that counts what is sent."""

    def __init__(self, client: Any) -> None:
        self._client = client
        self.sent = 0

    def __getattr__(self, name: str) -> Any:
        if name in ("execute_command", "pipeline"):
            self.sent += 1
        return getattr(self._client, name)


class Shouted(str):
    """A str that shows itself as something else."""

    __slots__ = ()

    def __str__(self) -> str:
        return self.upper() + "!"

    def __format__(self, _: str) -> str:
        return self.upper() + "!"


class Word(str, Enum):  # noqa: UP042  what a StrEnum replaces, and many programs still have
    """An enumeration as programs have them for types and statuses."""

    TYPE = "claude"
    STATUS = "busy"
    TEXT = "some-id"


@pytest.mark.parametrize(
    ("type", "status", "text"),
    [
        pytest.param(Word.TYPE, Word.STATUS, Word.TEXT, id="enum"),
        pytest.param(Shouted("claude"), Shouted("busy"), Shouted("some-id"), id="subclass"),
    ],
)
def test_a_str_that_shows_itself_otherwise_is_the_text_it_holds(
    world: World, type: Any, status: Any, text: Any
) -> None:
    """In a key's name it would be another than in the hash."""
    store = world.store()
    session = store.create_session(type, text, text, text, text, status=status)
    store.add_output(session.id, text)
    store.update_metadata(session.id, {"name": text})
    store.update_status(session.id, status)
    assert session.id.startswith("agent_claude_")
    assert store.get_metrics().sessions_by_type == {"claude": 1}
    assert store.get_metrics().busy_sessions == 1
    for given in (text, "some-id"):
        found = store.find_session_by_service_id(given)
        assert found is not None
        assert found.output_buffer == ("some-id",)
        assert found.metadata == {"name": "some-id"}
        assert len(store.find_sessions(task_id=given, mcp_session_id=given)) == 1
    assert len(store.find_sessions(type=type, status=[status])) == 1
    assert_consistent(world)
