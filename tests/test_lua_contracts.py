"""Every Lua script keeps the rules that all of them share.

Its header is its contract; its words of refusal are the codes of Python's errors; it defines no
globals; and a key of the wrong type stops it before its first write.
"""

from __future__ import annotations

import json
import re
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from hashlib import sha1
from pathlib import Path
from typing import Any

import pytest
import redis
from conftest import World
from faults import contents
from lupa import lua51
from programme import Attack, controls, proves
from rawkeys import crc16

import sessionstore
import sessionstore.pipelining
from sessionstore import SessionStoreError
from sessionstore._server import PrivateServer
from sessionstore.errors import _BY_CODE
from sessionstore.operations import SessionOperations
from sessionstore.scripts import Script, load

LUA = Path(sessionstore.__file__).parent / "lua"
SCRIPTS = sorted(path.stem for path in LUA.glob("*.lua"))
INCLUDES = sorted(path.stem for path in (LUA / "include").glob("*.lua"))
INTERNAL = {
    *("find_deleted", "open_store", "read_buffer", "read_events", "read_whole"),
    *("import_session", "stage_buffer"),
}
OF_THE_DOCTOR = {
    *("check_server", "check_keys", "check_sessions", "check_indexes", "check_members"),
    *("check_buffer", "repair_session", "repair_key", "repair_buffer"),
}
OF_LEASES = {"claim", "renew"}  # operations of a store and of a lease, more than one round trip

WRITING = (
    *("HSET", "HDEL", "SET", "DEL", "UNLINK", "SADD", "ZADD", "SREM", "ZREM"),
    *("RPUSH", "LPOP", "LTRIM", "XADD", "RENAME", "PERSIST", "PEXPIRE"),
)

every_script = pytest.mark.parametrize("script", SCRIPTS)
every_include = pytest.mark.parametrize("include", INCLUDES)


def text_of(script: str) -> str:
    return (LUA / f"{script}.lua").read_text("utf-8")


def header_of(script: str) -> str:
    """The comment lines at the top."""
    found = re.match(r"(?:--.*\n)+", text_of(script))
    return found[0] if found else ""


def includes_of(text: str) -> list[str]:
    return [
        name
        for line in re.findall(r"^--- @include (.*)$", text, re.MULTILINE)
        for name in line.split(", ")
    ]


# ---- Headers and includes -----------------------------------------------------------------


@every_script
def test_a_script_opens_with_its_name_and_purpose(script: str) -> None:
    assert re.match(rf"-- {script}: \w.+\n", header_of(script))


@every_script
def test_a_header_says_what_goes_in_and_what_comes_out(script: str) -> None:
    header = header_of(script)

    assert re.search(r"^-- KEYS    1 \w", header, re.MULTILINE)
    assert re.search(r"^-- Returns \S", header, re.MULTILINE)
    assert bool(re.search(r"^-- ARGV    1", header, re.MULTILINE)) == ("ARGV" in load(script).text)


@every_script
def test_a_script_is_named_for_its_operation(script: str) -> None:
    assert hasattr(SessionOperations, script) or script in INTERNAL | OF_LEASES | OF_THE_DOCTOR


@every_script
def test_a_write_takes_its_lane_and_number_first(script: str) -> None:
    header = header_of(script)

    is_write = "once" in includes_of(text_of(script))

    assert ("-- KEYS    1 lane" in header) == is_write
    assert ("-- ARGV    1 sequence" in header) == is_write


@every_script
def test_a_script_that_changes_keys_is_guarded_by_its_lane(script: str) -> None:
    """Opening a store is no write: a second run of it finds what the first has written."""
    writes = rf"redis\.p?call\('({'|'.join(WRITING)})'"
    changes = re.search(writes, load(script).text) is not None

    assert changes == ("once" in includes_of(text_of(script)) or script == "open_store")


@pytest.mark.parametrize("script", sorted(one for one in OF_THE_DOCTOR if one[:5] == "check"))
def test_a_check_has_no_command_that_writes(script: str) -> None:
    """Commands that mend are values there, which only a repair carries out."""
    assert "redis.call(unpack(" not in load(script).text
    assert "redis.call(command" not in text_of(script)


@every_script
def test_every_include_exists(script: str) -> None:
    assert set(includes_of(text_of(script))) <= set(INCLUDES)


@every_script
def test_a_loaded_script_holds_the_text_of_its_includes(script: str) -> None:
    loaded = load(script)

    assert "@include" not in loaded.text
    for include in includes_of(text_of(script)):
        assert (LUA / "include" / f"{include}.lua").read_text("utf-8") in loaded.text
    assert loaded.sha == sha1(loaded.text.encode()).hexdigest()


@every_include
def test_an_include_opens_with_its_name_and_includes_nothing(include: str) -> None:
    text = (LUA / "include" / f"{include}.lua").read_text("utf-8")

    assert text.startswith(f"-- {include}: ")
    assert includes_of(text) == []


@every_include
def test_an_include_is_used(include: str) -> None:
    assert any(include in includes_of(text_of(script)) for script in SCRIPTS)


# ---- Codes --------------------------------------------------------------------------------


def refusals_of(script: str) -> set[str]:
    return set(re.findall(r"refuse\(\s*'(\w+)'", load(script).text))


@every_script
def test_a_header_names_exactly_the_codes_that_the_script_refuses_with(script: str) -> None:
    line = re.search(r"^-- Errors  (.*)$", header_of(script), re.MULTILINE)

    assert set(line[1].split() if line else ()) == refusals_of(script)


@every_script
def test_every_code_of_a_script_has_an_error_class(script: str) -> None:
    assert refusals_of(script) <= set(_BY_CODE)


def of_a_script(error: type[SessionStoreError]) -> bool:
    """Whether the class makes its message from a script's details, or inherits one that does."""
    own: Any = error.message
    return own.__func__ is not vars(SessionStoreError)["message"].__func__


def test_every_error_class_of_a_script_is_some_scripts_refusal() -> None:
    used = set().union(*map(refusals_of, SCRIPTS))

    assert used == {code for code, error in _BY_CODE.items() if of_a_script(error)}


#: These must go on when memory is full, so that an hour of it kills no lease.
SHRINKING = {"claim", "renew", "reap", "update_status", "delete_session"}


def first_write(script: str) -> str:
    """The first write in the script's own text, apart from those of functions before it."""
    writes = rf"run_at_full_memory\(\)|\bmove\(|redis\.call\('(?:{'|'.join(WRITING)})'"
    body = text_of(script).partition("--- @include")[2]
    found = re.search(writes, re.sub(r"(?ms)^local function .*?^end$", "", body))
    assert found is not None
    return found[0]


@pytest.mark.parametrize("script", sorted(SHRINKING))
def test_what_must_run_at_full_memory_begins_with_what_lets_it(script: str) -> None:
    assert first_write(script) in ("run_at_full_memory()", "move(")


def test_a_move_begins_with_what_lets_a_script_run_at_full_memory() -> None:
    text = (LUA / "include" / "move.lua").read_text("utf-8")
    first = re.findall(r"run_at_full_memory\(\)|redis\.call\('(\w+)'", text)[:2]
    assert first == ["", "SREM"]  # either way


@pytest.mark.parametrize("script", ["create_session", "update_metadata", "import_session"])
def test_what_grows_does_not(script: str) -> None:
    """The control: the same look at other scripts."""
    assert first_write(script).startswith("redis.call('")


@every_script
def test_a_header_names_exactly_the_events_that_the_script_emits(script: str) -> None:
    line = re.search(r"^-- Event   (.*)$", header_of(script), re.MULTILINE)
    emitted = set(re.findall(r"\bevent\(events, '(\w+)'", text_of(script)))
    if re.search(r"\bremove\(", text_of(script)):
        emitted.add("deleted")

    assert set(line[1].split() if line else ()) == emitted


# ---- Globals ------------------------------------------------------------------------------

#: What Redis gives a script, as far as ours use it.
GIVEN = {
    "ARGV", "KEYS", "cjson", "ipairs", "math", "pcall", "redis", "string", "table", "tonumber",
    "type", "unpack",
}  # fmt: skip
GET_GLOBAL, SET_GLOBAL = 5, 7


class Bytecode:
    """The names of the globals that a compiled Lua 5.1 chunk reads and writes.

    The compiler sees every branch, which no run of a script does.
    """

    def __init__(self, text: str) -> None:
        self.read: set[str] = set()
        self.written: set[str] = set()
        dump = lua51.LuaRuntime(encoding=None).eval(
            b"function(text) return string.dump(assert(loadstring(text))) end"
        )
        self._bytes = bytes(dump(text.encode()))
        assert self._bytes[:5] == b"\x1bLua\x51"
        assert self._bytes[6:11] == b"\x01\x04\x08\x04\x08"  # little-endian, 64 bit
        self._at = 12
        self._function()

    def _take(self, format: str) -> Any:
        (value,) = struct.unpack_from("<" + format, self._bytes, self._at)
        self._at += struct.calcsize("<" + format)
        return value

    def _string(self) -> str:
        text = self._bytes[self._at + 8 :][: self._take("Q")]
        self._at += len(text)
        return text[:-1].decode(errors="replace")

    def _constant(self) -> str:
        kind = self._take("B")
        if kind == 4:
            return self._string()
        self._at += {0: 0, 1: 1, 3: 8}[kind]  # nil, boolean, number
        return ""

    def _function(self) -> None:
        self._string()  # its source
        self._at += 4 + 4 + 4  # its lines, and four small counts
        code = [self._take("I") for _ in range(self._take("I"))]
        constants = [self._constant() for _ in range(self._take("I"))]
        for instruction in code:
            if instruction & 0x3F == GET_GLOBAL:
                self.read.add(constants[instruction >> 14])
            elif instruction & 0x3F == SET_GLOBAL:
                self.written.add(constants[instruction >> 14])
        for _ in range(self._take("I")):
            self._function()
        for _ in range(self._take("I")):  # line numbers
            self._at += 4
        for _ in range(self._take("I")):  # local variables
            self._string()
            self._at += 8
        for _ in range(self._take("I")):  # upvalues
            self._string()


@every_script
def test_a_script_defines_no_globals(script: str) -> None:
    assert Bytecode(load(script).text).written == set()


@every_script
def test_a_script_reads_only_globals_that_redis_gives_it(script: str) -> None:
    assert Bytecode(load(script).text).read <= GIVEN


def test_a_global_in_a_branch_that_never_runs_is_found() -> None:
    found = Bytecode("local function f() if KEYS[9] then forgotten = misspelt end end")

    assert (found.written, found.read) == ({"forgotten"}, {"KEYS", "misspelt"})


@every_script
def test_a_script_that_writes_never_swallows_an_error(script: str) -> None:
    """But that nobody could be told of the change, which is made all the same."""
    text = load(script).text.replace("redis.pcall('PUBLISH', ", "")
    swallows = re.search(r"\bpcall\b", text) is not None
    assert not (swallows and "once" in includes_of(text_of(script)))


# ---- A key of the wrong type --------------------------------------------------------------


@dataclass(frozen=True)
class Write:
    """A write of a store's, and what comes before it."""

    act: Callable[[Any, str], Any]
    prepare: Callable[[Table, str], Any] = lambda *_: None


LONG = 3600.0  # seconds: no lease is renewed in the background during a test
RETENTION = 1000.0  # seconds


def claim(table: Table, session_id: str) -> None:
    table.store.claim(session_id, ttl=LONG)


def claim_a_moment_ago(table: Table, session_id: str) -> None:
    """Renewed within the same millisecond, it would expire at the same time."""
    claim(table, session_id)
    time.sleep(0.002)


def claim_by_another(table: Table, session_id: str) -> None:
    """By a worker whose fence the store does not know."""
    claim(table, session_id)
    table.forget_leases()


def lose(table: Table, session_id: str) -> None:
    """A lease of another worker that has expired, and was marked 15 seconds ago."""
    claim_by_another(table, session_id)
    raw, key = table.raw, table.world.session(session_id)
    raw.hset(key, mapping={"lease_expires_at": iso_of(1_000), "owner": "other:1"})
    raw.hset(key, "reap_seen_ms", int((time.time() - 15) * 1000))
    raw.zadd(f"{table.world.prefix}leases", {session_id: 1_000})
    owners = f"{table.world.prefix}sessions:owner:"
    raw.smove(f"{owners}{table.store.worker}", f"{owners}other:1", session_id)


def expire(table: Table, session_id: str) -> None:
    """The same without the mark."""
    lose(table, session_id)
    table.raw.hdel(table.world.session(session_id), "reap_seen_ms")


def be_idle(table: Table, session_id: str) -> None:
    key = table.world.session(session_id)
    table.raw.hset(key, "last_activity", iso_of(2_000))
    table.raw.zadd(f"{table.world.prefix}activity", {session_id: 2_000_000})


def end_long_ago(table: Table, session_id: str) -> None:
    table.store.update_status(session_id, "terminated")
    table.raw.zadd(f"{table.world.prefix}ended", {session_id: 1_000_000})


def iso_of(milliseconds: int) -> str:
    moment = datetime.fromtimestamp(milliseconds / 1000, UTC)
    return moment.isoformat(timespec="microseconds").replace("+00:00", "Z")


def reap(store: Any, **arguments: Any) -> None:
    if not store.reap(**arguments):
        raise SessionStoreError("it was passed over")


def renew(store: Any) -> None:
    (held,) = store._leases.held()
    store.carry(store._leases.renewing(held))


#: Of the sessions that are imported; it fits the service session "s".
IMPORTED_ID = f"agent_claude_{crc16('s') & 0xFF:02x}000000-0000-4000-8000-00000000abcd"


def exported(size: int = 0) -> list[str]:
    """An export of one session, whose output is staged if it is large."""
    time = iso_of(5_000)
    fields = {
        "id": IMPORTED_ID,
        "type": "claude",
        "status": "busy",
        "service_session_id": "s",
        "project_path": "/",
        "task_id": "task",
        "mcp_session_id": "mcp",
        "created_at": time,
        "last_activity": time,
        "owner": "other:1",
        "fence": "5",
        "lease_expires_at": time,
        "output_total": "2",
        "error_total": "1",
    }
    lines: list[dict[str, Any]] = [
        {"sessionstore": "export", "format": 1, "schema": "1"},
        {"session": IMPORTED_ID, "fields": fields},
        {"output": ["x" * size, "line"], "at": 0},
        {"errors": ["line"], "at": 0},
        {"end": IMPORTED_ID, "output": 2, "errors": 1},
        {"total": {"sessions": 1, "output": 2, "errors": 1, "unreadable": 0}},
    ]
    return list(map(json.dumps, lines))


def import_again(table: Table, _: str) -> None:
    table.store.import_sessions(exported())
    table.store.delete_session(IMPORTED_ID)
    table.store.import_sessions([line.replace('"/"', '"/other"') for line in exported()])


WRITES: dict[str, Write] = {
    "create_session": Write(
        lambda store, _: store.create_session("codex", "new", "/src", "task", "mcp")
    ),
    "import_sessions": Write(lambda store, _: store.import_sessions(exported())),
    "import_sessions, staged": Write(lambda store, _: store.import_sessions(exported(2**21))),
    "import_sessions, replace": Write(
        lambda store, _: store.import_sessions(exported(), existing="replace"), import_again
    ),
    "update_status": Write(lambda store, own: store.update_status(own, "terminated")),
    "update_activity": Write(lambda store, own: store.update_activity(own)),
    "add_output": Write(lambda store, own: store.add_output(own, "more")),
    "add_error": Write(lambda store, own: store.add_error(own, "more")),
    "update_metadata": Write(lambda store, own: store.update_metadata(own, {"a": None})),
    "delete_session": Write(lambda store, own: store.delete_session(own)),
    "claim": Write(lambda store, own: store.claim(own, ttl=LONG)),
    "claim, expired": Write(lambda store, own: store.claim(own, ttl=LONG), expire),
    "claim, ended": Write(
        lambda store, own: store.claim(own, ttl=LONG, expected=("error", "terminated")),
        end_long_ago,
    ),
    "add_output, held": Write(lambda store, own: store.add_output(own, "more"), claim),
    "renew": Write(lambda store, _: renew(store), claim_a_moment_ago),
    "release": Write(lambda store, own: store.update_status(own, "active"), claim),
    "end, held": Write(lambda store, own: store.update_status(own, "error"), claim),
    "delete_session, held": Write(lambda store, own: store.delete_session(own), claim),
    "update_status, force": Write(
        lambda store, own: store.update_status(own, "active", force=True), claim_by_another
    ),
    "delete_session, force": Write(
        lambda store, own: store.delete_session(own, force=True), claim_by_another
    ),
    "reap, marked": Write(lambda store, _: reap(store), expire),
    "reap, lost": Write(lambda store, _: reap(store), lose),
    "reap, idle": Write(lambda store, _: reap(store, idle_for=1000), be_idle),
    "reap, ended": Write(lambda store, _: reap(store, ended_for=1000), end_long_ago),
}
#: Of the sessions that are created: known beforehand, so that its keys can be spoilt too.
NEW_ID = "agent_codex_00000000-0000-4000-8000-000000000000"


@pytest.fixture
def world(server: PrivateServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    monkeypatch.setattr("sessionstore.operations.new_session_id", lambda *_: NEW_ID)
    opened = World("sync", server.program.name.lower(), server.url)
    yield opened
    opened.close()


class Table:
    """One session in a namespace of its own, set up anew for each key that is spoilt."""

    def __init__(self, world: World, prepare: Callable[[Table, str], Any]) -> None:
        self.world = world
        self.raw: Any = world.client()
        self.store = world.store(retention=RETENTION)
        self.id = "agent_claude_00000000-0000-4000-8000-000000000000"
        self._prepare = prepare
        self.set_up()

    def set_up(self) -> None:
        self.forget_leases()
        for key in self.raw.scan_iter(f"{self.world.prefix}*", count=1000):
            if b":lane:" not in key:
                self.raw.unlink(key)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("sessionstore.operations.new_session_id", lambda *_: self.id)
            self.store.create_session("claude", "s", "/src", "task", "mcp", metadata={"a": "b"})
        self.store.add_output(self.id, "line")
        self.store.add_error(self.id, "line")
        self._prepare(self, self.id)

    def forget_leases(self) -> None:
        self.store._leases.end_renewal()

    def contents(self) -> dict[bytes, bytes]:
        return contents(self.raw, self.world.prefix)

    def spoil(self, key: bytes) -> None:
        """Put something in the key's place that no script expects."""
        self.raw.unlink(key)
        if b":lane:" in key:
            self.raw.rpush(key, "spoilt")
        else:
            self.raw.set(key, "spoilt")

    def changed_keys(self, act: Callable[[Any, str], Any]) -> set[bytes]:
        """The keys that the write changes when all is well."""
        before = self.contents()
        act(self.store, self.id)
        after = self.contents()
        self.set_up()
        return {key for key in before | after if before.get(key) != after.get(key)}


def half_done(world: World, write: Write) -> tuple[list[str], int, int]:
    """Spoil each key of the namespace in turn, and carry out the write.

    Returns:
        The spoilt keys at which the write failed and had changed something all the same; at how
        many it failed; and how many were spoilt.
    """
    table = Table(world, write.prepare)
    concerned = table.changed_keys(write.act)
    assert concerned
    (lane,) = table.raw.scan_iter(f"{world.prefix}lane:*")
    found, failures, spoilt = [], 0, 0
    for key in sorted(concerned | set(table.contents()) | {lane}):
        kept = table.raw.dump(key) if key == lane else None
        table.spoil(key)
        spoilt += 1
        before = table.contents()
        try:
            write.act(table.store, table.id)
        except (redis.ResponseError, SessionStoreError):
            failures += 1
            if table.contents() != before:
                found.append(key.decode())
        else:
            # Nothing but a buffer that is removed, whatever it is, may go unnoticed.
            if key in concerned and table.raw.exists(key):
                found.append(f"{key.decode()}, unnoticed")
        if kept is not None:
            table.raw.restore(key, 600_000, kept, replace=True)
        table.set_up()
    table.forget_leases()
    print(*found, sep="\n")
    return found, failures, spoilt


@pytest.mark.parametrize("name", WRITES)
@proves("wrong types", ordinary=5, full=5)
def test_a_key_of_the_wrong_type_stops_a_write_before_it_changes_anything(
    world: World, name: str, attack: Attack
) -> None:
    found, failures, spoilt = half_done(world, WRITES[name])

    assert failures >= 2  # the session's own hash, and the lane
    attack.tell(injected=spoilt, wrong=len(found), writes_stopped=failures)


def test_every_script_that_writes_has_its_keys_spoilt() -> None:
    """But the doctor's, which set such keys aside: that is their work."""
    writing = {one for one in SCRIPTS if "once" in includes_of(text_of(one))} - OF_THE_DOCTOR
    tried = {name.partition(",")[0] for name in WRITES}
    tried = {"import_session" if name == "import_sessions" else name for name in tried}
    assert tried - {"release", "end"} == writing - {"stage_buffer"}  # of a large import


def unchecked(name: str) -> Script:
    """A script that does not look at its keys' types first."""
    text = load(name).text.replace("redis.call(PROBE[type], key)", "")
    text = text.replace("found ~= type and found ~= 'none'", "false")
    return Script(text, sha1(text.encode()).hexdigest())


@pytest.mark.parametrize(
    "name",
    [
        *("create_session", "update_status", "delete_session", "claim", "claim, expired"),
        *("import_sessions", "import_sessions, replace"),
        *("renew", "release", "delete_session, held", "reap, lost", "reap, idle", "reap, ended"),
    ],
)
@controls("wrong types", ordinary=5)
def test_without_the_check_a_key_of_the_wrong_type_leaves_a_write_half_done(
    world: World, name: str, monkeypatch: pytest.MonkeyPatch, attack: Attack
) -> None:
    monkeypatch.setattr(sessionstore.pipelining, "load", unchecked)

    found, failures, spoilt = half_done(world, WRITES[name])

    attack.tell(injected=spoilt, wrong=len(found), writes_stopped=failures)


# ---- A session that retention passes over -------------------------------------------------------


def torn_by_retention(world: World) -> tuple[list[str], int, int]:
    """Spoil each key of a session that a create would clear, in turn, and create.

    Returns:
        The spoilt keys at which the session was cleared in part; at how many it was left alone; and
        how many were spoilt.
    """
    table = Table(world, end_long_ago)
    prefix = world.prefix.encode()
    of_the_session = {key for key in table.contents() if b":session" in key}
    of_the_session -= {prefix + b"sessions"}
    found, left_alone = [], 0
    for key in sorted(of_the_session):
        table.spoil(key)
        before = table.contents()
        with suppress(redis.ResponseError):
            table.store.create_session("codex", "new", "/src")
        after = table.contents()
        kept = {one for one in of_the_session if before[one] == after.get(one)}
        for name in ("sessions", "ended"):
            if table.raw.zscore(world.prefix + name, table.id) is not None:
                kept.add(name.encode())
        left_alone += kept == of_the_session | {b"sessions", b"ended"}
        if kept and kept != of_the_session | {b"sessions", b"ended"}:
            found.append(key.decode())
        table.set_up()
    print(*found, sep="\n")
    return found, left_alone, len(of_the_session)


@proves("wrong types", ordinary=6, full=6)
def test_an_expired_session_with_a_spoilt_key_is_cleared_whole_or_left_alone(
    world: World, attack: Attack
) -> None:
    found, left_alone, spoilt = torn_by_retention(world)

    assert left_alone == 6  # its hash, and the sets of type, status, service, task and mcp
    attack.tell(injected=spoilt, wrong=len(found), sessions_left_alone=left_alone)


@controls("wrong types", ordinary=6)
def test_without_the_check_an_expired_session_is_cleared_in_part(
    world: World, monkeypatch: pytest.MonkeyPatch, attack: Attack
) -> None:
    monkeypatch.setattr(sessionstore.pipelining, "load", unchecked)

    found, left_alone, spoilt = torn_by_retention(world)

    attack.tell(injected=spoilt, wrong=len(found), sessions_left_alone=left_alone)
