"""Least privilege: what the rule of each role allows is what it needs, and nothing else.

That the contract holds under these rules is shown by its tests: on real servers they connect as a
worker, or where they check, repair or import as an operator, and fail if anything was denied.
"""

from __future__ import annotations

import asyncio
import re
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from hashlib import sha256
from importlib.resources import files
from pathlib import Path
from typing import Any, get_args
from uuid import uuid4

import conftest
import pytest
import redis
from clusters import PrivateCluster
from conftest import (
    CLUSTER,
    PASSWORD,
    SERVERS,
    STYLES,
    Awaiting,
    World,
    acl_server,
    acl_words,
    url_for,
)
from consistency import assert_consistent
from moments import expire_lease
from test_contract_batch import batch_of
from waiting import until

import sessionstore.importing
from sessionstore import (
    AsyncSessionStore,
    InvalidArgumentError,
    SchemaMismatchError,
    SessionNotFoundError,
    SessionStatusError,
    SessionStore,
    acl,
)
from sessionstore._server import PrivateServer
from sessionstore.errors import of_any_server
from sessionstore.scripts import load
from sessionstore.settings import StoreSettings

READER, WORKER, OPERATOR = "reader", "worker", "operator"
ROLES = get_args(acl.Role)
OLDEST, MISSING = "0", "agent_claude_00000000-0000-4000-8000-000000000000"
LONG = 3600.0  # seconds: no lease is renewed in the background
#: Denied these, a store goes on, with a warning, a slower way or fewer news.
DONE_WITHOUT = frozenset(
    {"client|setinfo", "info", "script|load", "publish", "subscribe", "unsubscribe"}
)


class Place(World):
    """A real server with users of any rule."""

    def user(
        self, role: acl.Role, *, lacking: str = "", namespace: str = "", partitions: int = 0
    ) -> str:
        """A new user's name: of a role, perhaps without one of its commands."""
        settings = StoreSettings(
            namespace=namespace or self.namespace,
            partitions=partitions or self.partitions,  # type: ignore[arg-type]
            cluster=self.target == CLUSTER,
        )
        assert self.url is not None
        name = f"{self.namespace}-{len(self._users)}"
        self._users[name, 0] = name
        self._acl(*acl_words(name, role, self.url, settings, lacking))
        return name

    def as_user(self, name: str, **settings: Any) -> Any:
        """A store of a user."""
        assert self.url is not None
        return self.store(url=url_for(self.url, name), **settings)

    def as_role(self, role: acl.Role, **settings: Any) -> Any:
        """A store of a new user of a role."""
        return self.as_user(self.user(role), **settings)

    def plain(self, name: str) -> Any:
        """A plain client of a user."""
        assert self.url is not None
        client: Any = redis.Redis.from_url(url_for(self.url, name), decode_responses=True)
        self._opened.append(client)
        return client

    def denied(self, name: str) -> set[str]:
        """The commands that a user was denied."""
        logs = [entry for log in self._acl("ACL LOG") for entry in log]
        return {one["object"] for one in logs if one["username"] == name}

    def _denied(self) -> list[dict[str, Any]]:
        return []  # on purpose

    def dump(self) -> dict[str, Any]:
        """Every key of the namespace as it is stored."""
        keys = sorted(self.redis.scan_iter(self.pattern, count=1000))
        with redis.Redis.from_url(str(self.url)) as client:
            return {key: client.dump(key) for key in keys}


@pytest.fixture(params=[f"{server}-{n}" for n in (1, 16) for server in SERVERS])
def place(
    request: pytest.FixtureRequest, running: Callable[[str], PrivateServer], style: str
) -> Iterator[Place]:
    """Each real server, with 1 and 16 partitions."""
    server, partitions = request.param.split("-")
    place = Place(style, server, running(server).url, int(partitions))
    try:
        yield place
    finally:
        place.close()


@pytest.fixture(params=STYLES)
def style(request: pytest.FixtureRequest) -> str:
    return str(request.param)


each_role = pytest.mark.parametrize("role", ROLES)


# ---- Every operation ----------------------------------------------------------------------------


def works(store: Any, plain: Any, place: Place) -> None:
    """A worker's programme: every operation that writes."""
    session = store.create_session(
        "claude", "service-1", "/src", "task", "mcp", metadata={"a": "1"}, unique=True
    )
    own = session.id
    store.update_activity(own)
    store.update_metadata(own, {"a": None, "b": "2"})
    assert store.add_output(own, *(f"line {n}" for n in range(9))) == 9
    assert store.add_error(own, "an error", "x" * 300) == 2
    store.update_status(own, "busy", expected="active")
    store.update_status(own, "active", expected="busy")
    with store.claim(own, ttl=LONG):
        store.add_output(own, "under a lease")
    with store.writer(own) as out:
        out.write("written\n")
    with batch_of(place, store) as batch:
        added, moved = batch.add_output(own, "together"), batch.update_activity(own)
    assert (added.result() > 9, moved.result()) == (True, None)
    with pytest.raises(SessionStatusError):
        store.update_status(own, "busy", expected="terminated")
    store.create_session("codex", "service-2", "/src", status="terminated")
    store.create_session("codex", "service-3", "/src")  # and by its retention, the last is gone
    lost = store.create_session("codex", "service-4", "/src").id
    store.claim(lost, ttl=LONG)
    expire_lease(place, lost, 100.0)
    store.reap(idle_for=0)
    store.reap(ended_for=0)
    other = store.create_session("claude", "service-5", "/src").id
    sends_again(plain, place, other)
    assert plain.execute_command("WAIT", 0, 1) == 0  # with wait_replicas, in a write's pipeline
    assert store.delete_session(other) is True
    kept = store.create_session("claude", "service-6", "/src", "task", "mcp").id
    store.add_output(kept, "x" * 90, "y" * 90)


def sends_again(plain: Any, place: Place, session_id: str) -> None:
    """A write whose reply was lost."""
    prefix, session = place.prefix_of(session_id), place.session(session_id)
    keys = (f"{prefix}lane:again-0", session, f"{prefix}activity")
    text = load("update_activity").text
    for _ in range(2):
        assert plain.eval(text, len(keys), *keys, 1, session_id) == "ok"


def reads(store: Any) -> None:
    """A reader's programme: every operation that only reads."""
    assert store.ping() is True
    (first, *_) = sessions = store.get_all_sessions()
    assert store.get_session(first.id) is not None
    assert store.get_session(first.id, tail=0).id == first.id
    assert store.find_session(first.id, tail=1).id == first.id
    found = store.find_session_by_service_id(first.service_session_id, live=True)
    assert found is None or found.id == first.id
    assert store.get_sessions_by_type(first.type)
    assert store.find_sessions(type=first.type, status=first.status, task_id=first.task_id)
    store.find_sessions(idle_for=0, mcp_session_id="mcp")
    assert store.find_sessions(idle_for=0)
    assert store.find_sessions(order="-last_activity", limit=1)
    assert [one.id for one in store.iter_sessions()] == [one.id for one in sessions]
    with pytest.raises(SessionNotFoundError):
        next(store.follow_output(MISSING))
    store.read_output(first.id)
    store.read_errors(first.id, limit=1)
    assert next(store.watch(OLDEST)).event
    assert store.get_metrics().total_sessions == len(sessions)
    assert store.drift().sessions == len(sessions)
    assert len(list(store.export_sessions())) > len(sessions)
    assert len(list(store.export_sessions(type="claude", idle_for=0))) > 1


def follows(store: Any, place: Place, name: str) -> None:
    """Follow the output of two sessions, of which one ends."""
    ids = [place.store().create_session("claude", f"f{n}", "/src").id for n in range(2)]
    channels = [place.session(one, ":output") for one in ids]
    admin = place.store()
    for one in ids:
        admin.add_output(one, "first")
    first, second = (store.follow_output(one) for one in ids)
    assert next(first).chunks == next(second).chunks == ("first",)

    def heard(*wanted: str) -> bool:
        return set(wanted) == {*place.redis.pubsub_channels()} & {*channels}

    place.until(lambda: heard(*channels) or place.denied(name), 5)
    admin.update_status(ids[0], "terminated")
    assert list(first)[-1].ended
    admin.add_output(ids[1], "second")
    assert next(second).chunks == ("second",)
    place.until(lambda: heard(channels[1]) or place.denied(name), 5)


def mends(store: Any, place: Place) -> None:
    """An operator's programme: what it does beside a worker's and a reader's."""
    sessions = store.get_all_sessions()
    key, prefix = place.session(sessions[0].id), place.prefix_of(sessions[0].id)
    place.redis.hset(key, "output_bytes", 1)
    place.redis.expire(key, 1000)
    place.redis.set(f"{prefix}sessions:task:spoilt", "a string")
    place.redis.sadd(f"{prefix}sessions:service:large", *(f"ghost{n}" for n in range(300)))
    place.redis.zadd(f"{prefix}activity", {f"ghost{n}": n for n in range(300)})
    assert {one.kind for one in store.check()} > {"index_orphan", "wrong_type", "expiry"}
    assert [one for one in store.repair() if one.repaired]
    place.redis.unlink(f"{prefix}quarantine:sessions:task:spoilt")
    assert not [one for one in store.check() if not one.warning]
    lines = list(store.export_sessions())
    assert store.import_sessions(lines).imported == 0
    for one in sessions:
        store.delete_session(one.id)
    assert store.import_sessions(lines).imported == len(sessions)
    changed = [line.replace('"/src"', '"/dst"') for line in lines]
    store.import_sessions(changed, existing="replace")
    assert {one.project_path for one in store.get_all_sessions()} == {"/dst"}


SETTINGS: dict[str, Any] = {
    "buffer_limit": 5, "buffer_bytes": 200, "retention": 0.0, "reap_grace": 0.001,
}  # fmt: skip


def programme(place: Place, role: acl.Role, name: str) -> None:
    """All that a user of a role does."""
    store = place.as_user(name, **SETTINGS)
    if role == READER:
        works(place.store(**SETTINGS), place.redis, place)
    else:
        works(store, place.plain(name), place)
    reads(store)
    if role == OPERATOR:
        mends(store, place)
    if role != OPERATOR:  # as a worker does
        follows(store, place, name)


@pytest.fixture(autouse=True)
def _staged(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small buffers are staged by an import."""
    monkeypatch.setattr(sessionstore.importing, "MOST_AT_ONCE", 100)


@each_role
def test_a_role_is_denied_nothing_that_it_needs(place: Place, role: acl.Role) -> None:
    name = place.user(role)

    programme(place, role, name)

    assert place.denied(name) == set()
    assert_consistent(place)


@each_role
def test_the_rule_of_a_server_without_selectors_is_enough_too(
    place: Place, role: acl.Role, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Later servers take it as well. A store goes on without CLIENT SETINFO; a reader of it does
    without telling itself of what it follows."""
    monkeypatch.setattr(conftest, "acl_server", lambda _: acl.Server.named("redis-6.2"))
    name = place.user(role)

    programme(place, role, name)

    assert place.denied(name) <= {"client|setinfo", *(["publish"] if role == READER else [])}


# ---- The least ----------------------------------------------------------------------------------


def commands_of(role: acl.Role, server: acl.Server, **settings: Any) -> set[str]:
    """The commands that a rule names, selectors included."""
    return set(
        re.findall(r"\+([a-z|]+)", " ".join(acl.rule(role, StoreSettings(**settings), server)))
    )


@each_role
def test_without_any_one_of_its_commands_a_role_is_denied_something(
    place: Place, role: acl.Role, style: str, request: pytest.FixtureRequest
) -> None:
    """Each command of the rule is taken away in turn; the styles share them."""
    assert place.url is not None
    commands = commands_of(role, acl_server(place.url))
    if role == OPERATOR:
        commands -= commands_of(WORKER, acl_server(place.url))
    own = sorted(commands)
    if not request.config.getoption("--every-server"):
        own = own[STYLES.index(style) :: 2]
    missed: list[str] = []
    for command in own:
        place.remove()
        name = place.user(role, lacking=command)
        try:
            programme(place, role, name)
        except Exception:
            failed = True
        else:
            failed = False
        if place.denied(name) != {command} or failed == (command in DONE_WITHOUT):
            missed.append(f"{command}: failed {failed}, denied {place.denied(name)}")
    assert not missed


SCRIPTS = sorted(path.name[:-4] for path in (files("sessionstore") / "lua").iterdir()
                 if path.name.endswith(".lua"))  # fmt: skip
READING = {
    *("drift", "export_sessions", "find_deleted", "find_session_by_service_id", "find_sessions"),
    *("get_metrics", "get_session", "open_store", "ping", "read_buffer", "read_events"),
    "read_whole",
}
MENDING = {one for one in SCRIPTS if re.match(r"check_|repair_|import_|stage_", one)}
NO_COMMANDS = {"COUNT", "KEEPTTL", "LIMIT", "MATCH", "MAXLEN", "WEIGHTS", "WITHSCORES"}


def test_every_command_of_a_script_is_in_the_rule_of_who_runs_it() -> None:
    """Those in branches too that no test comes to."""
    unused = commands_of(OPERATOR, acl.Server())
    for script in SCRIPTS:
        text = load(script).text
        named = {one.lower() for one in {*re.findall(r"'([A-Z]{3,})'", text)} - NO_COMMANDS}
        if "must_be('hash'" not in text:
            named.discard("hlen")  # of types.lua
        if script == "open_store":
            named.discard("hset")  # a reader does without
        role: acl.Role = (
            "reader" if script in READING else "operator" if script in MENDING else "worker"
        )
        assert named <= commands_of(role, acl.Server()), script
        unused -= named
    assert unused == {
        *("client|setinfo", "eval", "evalsha", "exec", "multi", "script|load", "subscribe"),
        *("unsubscribe", "wait"),
    }


# ---- Nothing else -------------------------------------------------------------------------------


def catalogue(client: Any) -> dict[str, tuple[int, bool]]:
    """Every command of a server, subcommands in place of what has some.

    For each how many words it has at least, and whether anybody may send it.
    """
    found: dict[str, tuple[int, bool]] = {}
    for name, told in client.command().items():
        for one in told["subcommands"]:
            found[one[0].lower()] = abs(one[1]), False
        if not told["subcommands"]:
            found[name.lower()] = abs(told["arity"]), "no_auth" in told["flags"]
    return found


@each_role
def test_of_all_commands_of_a_server_a_role_may_use_those_of_its_rule(
    place: Place, role: acl.Role
) -> None:
    assert place.url is not None
    name, named = place.user(role), commands_of(role, acl_server(place.url))
    commands = catalogue(place.redis)

    allowed: set[str] = set()
    for command, (arity, _) in commands.items():
        words = command.split("|")
        words += [f"{place.prefixes[0]}x"] * (arity - len(words))
        if "permissions to run" not in str(place.redis.execute_command("ACL DRYRUN", name, *words)):
            allowed.add(command)

    assert len(commands) > 300
    assert allowed == named | {one for one, (_, is_free) in commands.items() if is_free}


MUTATORS: dict[str, Callable[[Any, str], Any]] = {
    "add_error": lambda store, own: store.add_error(own, "x"),
    "add_output": lambda store, own: store.add_output(own, "x"),
    "claim": lambda store, own: store.claim(own, ttl=LONG),
    "create_session": lambda store, _: store.create_session("codex", "new", "/src"),
    "delete_session": lambda store, own: store.delete_session(own, force=True),
    "import_sessions": lambda store, _: store.import_sessions(
        line.replace("/src", "/dst") for line in list(store.export_sessions())
    ),
    "reap": lambda store, _: store.reap(idle_for=0, ended_for=0),
    "repair": lambda store, _: list(store.repair()),
    "update_activity": lambda store, own: store.update_activity(own),
    "update_metadata": lambda store, own: store.update_metadata(own, {"a": "b"}),
    "update_status": lambda store, own: store.update_status(own, "error", force=True),
    "batch": lambda store, own: in_a_batch(store, own),
    "writer": lambda store, own: write_a_line(store, own),
}
READS = {
    *("drift", "export_sessions", "find_session", "find_session_by_service_id", "find_sessions"),
    *("follow_errors", "follow_output", "get_all_sessions", "get_metrics", "get_session"),
    *("get_sessions_by_type", "iter_sessions", "ping", "read_errors", "read_output", "watch"),
    "check",  # which a reader may not either, for SCAN shows others' keys
}
LOCAL = {"carry", "close", "drain", "execute", "follow", "from_url", "repeat", "worker"}


def write_a_line(store: Any, own: str) -> None:
    with store.writer(own) as out:
        out.write("x\n")


def in_a_batch(store: Any, own: str) -> None:
    runner = getattr(store, "_runner", None)
    batch = store.batch() if runner is None else Awaiting(store.batch(), runner)
    with batch:
        outcome = batch.add_output(own, "x")
    outcome.result()


def test_every_method_is_known_to_read_or_to_write() -> None:
    for kind in (SessionStore, AsyncSessionStore):
        assert {one for one in dir(kind) if one[0] != "_"} == {*MUTATORS, *READS, *LOCAL}


@pytest.mark.parametrize("mutator", MUTATORS)
def test_a_reader_changes_nothing(place: Place, mutator: str) -> None:
    works(place.store(**SETTINGS), place.redis, place)
    own = place.store().create_session("claude", "service-9", "/src").id
    expire_lease(place, place.store().claim(own, ttl=LONG).session_id)
    reader, before = place.as_role("reader", **SETTINGS), place.dump()
    assert len(before) > 10

    with pytest.raises(redis.exceptions.NoPermissionError):
        MUTATORS[mutator](reader, own)

    assert place.dump() == before
    reads(reader)
    assert place.dump() == before


def test_a_reader_that_comes_before_all_workers_sees_an_empty_store(place: Place) -> None:
    reader = place.as_role("reader")

    assert reader.get_metrics().total_sessions == 0
    assert reader.get_all_sessions() == []
    assert reader.find_session(MISSING) is None
    assert not place.keys()

    own = place.store().create_session("claude", "service-1", "/src").id
    assert reader.get_session(own).id == own


def test_a_reader_that_came_first_is_refused_when_the_layout_is_another(place: Place) -> None:
    reader = place.as_role("reader")
    assert reader.get_metrics().total_sessions == 0

    place.store(partitions=256).ping()

    with pytest.raises(SchemaMismatchError, match="256"):
        reader.get_metrics()


def test_many_tasks_of_a_reader_that_comes_first(server: PrivateServer) -> None:
    """They wait for one look at the layout, each of them until the namespace has one."""
    place = Place("sync", server.program.name.lower(), server.url)
    url = url_for(server.url, place.user("reader"))

    async def looks() -> None:
        async with AsyncSessionStore.from_url(url, namespace=place.namespace) as reader:
            for _ in range(2):
                told = await asyncio.gather(*(reader.get_metrics() for _ in range(50)))
                assert {one.total_sessions for one in told} == {0}
            await asyncio.to_thread(place.store().create_session, "claude", "s", "/src")
            told = await asyncio.gather(*(reader.get_metrics() for _ in range(50)))
            assert {one.total_sessions for one in told} == {1}

    try:
        asyncio.run(asyncio.wait_for(looks(), 20))
    finally:
        place.close()


def test_followers_of_a_reader_are_woken_by_news(place: Place, only_news: None) -> None:  # noqa: ARG001
    admin, name = place.store(), place.user("reader")
    reader, own = place.as_user(name), admin.create_session("claude", "s", "/src").id
    admin.add_output(own, "first")
    following = reader.follow_output(own)
    assert next(following).chunks == ("first",)
    place.until(lambda: place.redis.pubsub_channels(place.session(own, ":output")), 5)

    admin.add_output(own, "second")

    assert next(following).chunks == ("second",)
    assert place.denied(name) == set()


def test_a_reader_wakes_nobody_else(place: Place) -> None:
    plain = place.plain(place.user("reader"))
    own = place.store().create_session("claude", "s", "/src").id

    for channel in (place.session(own, ":output"), f"{place.prefixes[0]}events"):
        with pytest.raises(redis.exceptions.NoPermissionError):
            plain.publish(channel, "1")
    assert plain.publish(f"{{{place.namespace}}}:news:x", "") == 0


# ---- Nowhere else -------------------------------------------------------------------------------


def neighbours(namespace: str) -> list[str]:
    """Prefixes of keys that are nearly those of a namespace with 1 or 16 partitions."""
    names = [f"{namespace}2", f"{namespace}:x", namespace[:-1], f"x{namespace}", namespace.upper()]
    names += [f"{name}/aa" for name in names] + [f"{namespace}/{tag}" for tag in ("aaa", "a", "zz")]
    return [
        *(f"{{{name}}}:" for name in names),
        *(f"{{{namespace}}}x:", f"{namespace}:", f"{{{namespace}", f"x{{{namespace}}}:", ""),
    ]


@each_role
def test_no_role_reaches_a_key_outside_the_namespace(place: Place, role: acl.Role) -> None:
    prefixes = neighbours(place.namespace)
    if place.partitions == 1:
        prefixes.append(f"{{{place.namespace}/aa}}:")
    plain = place.plain(place.user(role))
    inside = f"{place.prefixes[-1]}x"
    for prefix in prefixes:
        key = f"{prefix}{uuid4().hex}"
        place.redis.hset(key, "secret", "1")
        for words in (
            ("HGETALL", key),
            ("HSET", key, "secret", "2"),
            ("RENAME", key, inside),
            ("RENAME", inside, key),
            ("EVAL", "return redis.call('HGETALL', KEYS[1])", 1, key),
            ("EVAL", "return redis.call('HGETALL', ARGV[1])", 0, key),
            ("EVAL", "return redis.call('HGETALL', ARGV[1])", 1, inside, key),
            ("EVAL", "return redis.call('HSET', ARGV[1], 'secret', '2')", 0, key),
            ("EVAL", "return redis.call('UNLINK', ARGV[1])", 0, key),
            ("ZINTER", 2, inside, key),
            ("SUBSCRIBE", key),
            ("PUBLISH", key, "1"),
        ):
            with pytest.raises(redis.ResponseError) as denied:
                plain.execute_command(*words)
            error = of_any_server(denied.value)
            assert isinstance(error, redis.exceptions.NoPermissionError), words
        assert place.redis.hgetall(key) == {"secret": "1"}
        place.redis.unlink(key)


DANGEROUS = (
    *("FLUSHALL", "FLUSHDB", "CONFIG GET *", "CONFIG SET maxmemory 1", "DEBUG OBJECT", "SHUTDOWN"),
    *("MIGRATE h 1 k 0 1", "RESTORE k 0 v", "DUMP k", "SWAPDB 0 1", "MOVE k 1", "COPY k l"),
    *("KEYS *", "RANDOMKEY", "MONITOR", "ACL LIST", "ACL SETUSER x", "CLIENT LIST", "SAVE"),
    *("CLIENT KILL TYPE normal", "REPLICAOF NO ONE", "MODULE LIST", "PSUBSCRIBE *", "SORT k"),
    *("SCRIPT FLUSH", "SCRIPT KILL", "FUNCTION LIST", "SELECT 1", "SLOWLOG GET", "DBSIZE"),
)


@each_role
def test_no_role_may_send_what_concerns_a_whole_server(place: Place, role: acl.Role) -> None:
    plain = place.plain(place.user(role))
    for line in (*DANGEROUS, *(() if role == OPERATOR else ("SCAN 0",))):
        with pytest.raises(redis.ResponseError, match=r"no permissions|DEBUG command not allowed"):
            plain.execute_command(*line.split(" "))
        script = "return redis.call(unpack(ARGV))"
        with pytest.raises(redis.ResponseError):
            plain.eval(script, 0, *line.split(" "))
    assert place.redis.ping()


# ---- Errors -------------------------------------------------------------------------------------


def test_what_is_denied_is_told_at_once_in_the_servers_words(place: Place) -> None:
    own = place.store().create_session("claude", "s", "/src").id
    reader = place.as_role("reader", deadline=60)
    began = time.monotonic()
    with pytest.raises(redis.exceptions.NoPermissionError, match=r"can't run|no permissions"):
        reader.add_output(own, "x")
    assert time.monotonic() - began < 5


@pytest.mark.parametrize(
    "words",
    [
        "Error running script (call to f_1a): @user_script:5: @user_script: 5: {}",
        "{} script: 1a, on @user_script:21.",
        "ACL failure in script: User x has no permissions to run the 'get' command",
    ],
    ids=["6.2", "7.0", "7.2"],
)
def test_a_denial_inside_a_script_is_told_alike_by_all_servers(words: str) -> None:
    denial = "The user executing the script can't run this command or subcommand"
    error = of_any_server(redis.ResponseError(words.format(denial)))

    assert isinstance(error, redis.exceptions.NoPermissionError)
    assert str(error).startswith(("The user executing", "ACL failure"))


# ---- The tests themselves -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("looser", "noticed_by"),
    [
        (["+@read"], "test_of_all_commands_of_a_server_a_role_may_use_those_of_its_rule"),
        (["~*", "&*"], "test_no_role_reaches_a_key_outside_the_namespace"),
        (["~{*", "&{*"], "test_no_role_reaches_a_key_outside_the_namespace"),
        (["+keys"], "test_no_role_may_send_what_concerns_a_whole_server"),
        (["+@all", "~*"], "test_a_reader_changes_nothing"),
    ],
)
def test_a_looser_rule_is_noticed(
    place: Place, looser: list[str], noticed_by: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rule = acl.rule
    monkeypatch.setattr(acl, "rule", lambda *args, **kwargs: [*rule(*args, **kwargs), *looser])
    argument = "add_output" if noticed_by == "test_a_reader_changes_nothing" else "reader"

    with pytest.raises((AssertionError, pytest.fail.Exception)):
        globals()[noticed_by](place, argument)


# ---- On a cluster -------------------------------------------------------------------------------


@pytest.fixture(params=[1, 16])
def on_cluster(
    request: pytest.FixtureRequest, running: Callable[[str], Any], style: str
) -> Iterator[Place]:
    place = Place(style, CLUSTER, running(CLUSTER).url, request.param)
    try:
        yield place
    finally:
        place.close()


@each_role
def test_on_a_cluster_a_role_is_denied_nothing_that_it_needs(
    on_cluster: Place, role: acl.Role
) -> None:
    place, name = on_cluster, on_cluster.user(role)
    works(place.store(**SETTINGS), place.redis, place)
    store = place.as_user(name, **SETTINGS)
    reads(store)
    if role == OPERATOR:
        mends(store, place)
    assert place.denied(name) == set()


@pytest.mark.parametrize("command", ["cluster|slots", "command"])
def test_a_cluster_client_needs_to_know_the_cluster(on_cluster: Place, command: str) -> None:
    name = on_cluster.user("worker", lacking=command)
    with pytest.raises(redis.exceptions.RedisError):
        on_cluster.as_user(name, deadline=0.5).ping()
    assert on_cluster.denied(name) == {command}


def test_a_worker_waits_while_its_slot_moves(
    running: Callable[[str], PrivateCluster], style: str
) -> None:
    """Its client says ASKING to the other node, which has it wait."""
    cluster = running(CLUSTER)
    place = Place(style, CLUSTER, cluster.url)
    may, may_not = (place.user("worker", lacking=one) for one in ("", "asking"))
    waiting = place.as_user(may, deadline=30)
    waiting.create_session("claude", "s", "/src")
    slot, keys = int(place.redis.keyslot(place.meta)), len(place.keys())
    source = cluster.owner_of(slot)
    target = cluster.next_to(source)

    def asked() -> int:
        stats: Any = cluster.admin(target).info("commandstats")
        return int(stats.get("cmdstat_asking", {}).get("calls", 0))

    with ThreadPoolExecutor(1) as pool:
        answers: list[Future[Any]] = []

        def look(moved: int) -> None:
            if moved == keys and not answers:
                with pytest.raises(redis.exceptions.NoPermissionError):
                    place.as_user(may_not).get_metrics()
                before = asked()
                answers.append(pool.submit(waiting.get_metrics))
                until(lambda: asked() > before)

        try:
            cluster.move(slot, target, look)
            assert answers[0].result().total_sessions == 1
            assert (place.denied(may), place.denied(may_not)) == (set(), {"asking"})
        finally:
            place.close()


# ---- The line -----------------------------------------------------------------------------------


def test_the_line_sets_a_user_as_it_is(server: PrivateServer) -> None:
    """Sent as text, as redis-cli takes it from a pipe."""
    user = f"u-{uuid4().hex[:8]}"
    settings = StoreSettings(namespace="a:b", partitions=16)
    words = acl.rule("reader", settings, acl_server(server.url))
    line = acl.setuser(user, words, sha256(PASSWORD.encode()).hexdigest())

    with socket.create_connection(("127.0.0.1", server.port), 5) as connection:
        connection.sendall(f"{line}\r\n".encode())
        assert connection.recv(1000) == b"+OK\r\n"

    with redis.Redis.from_url(url_for(server.url, user)) as client:
        assert client.hgetall("{a:b/aa}:session:x") == {}
    with redis.Redis.from_url(server.url) as client:
        client.acl_deluser(user)


@each_role
def test_the_line_may_stand_in_an_acl_file(
    server: PrivateServer, role: acl.Role, tmp_path: Path
) -> None:
    settings = StoreSettings(namespace="agents", partitions=16)
    words = acl.rule(role, settings, acl_server(server.url))
    line = acl.setuser("u", words, sha256(PASSWORD.encode()).hexdigest())
    file = tmp_path / "users.acl"
    file.write_text(line.replace("ACL SETUSER", "user") + "\nuser default on nopass ~* &* +@all\n")

    with PrivateServer(server.program, ("--aclfile", str(file))) as own:
        with SessionStore.from_url(own.url, namespace="agents", partitions=16) as store:
            store.create_session("claude", "s", "/src")
        url = url_for(own.url, "u")
        with SessionStore.from_url(url, namespace="agents", partitions=16) as store:
            reads(store)


@pytest.mark.parametrize(
    ("name", "has_selectors", "has_setinfo"),
    [
        *(("redis-6.2", False, False), ("redis-6.2.14", False, False), ("redis-7", True, False)),
        *(("Redis-7.0.15", True, False), ("redis-7.2", True, True), ("redis-8", True, True)),
        *(("valkey-7.2", True, True), ("valkey-9", True, True), ("valkey-9.1.2", True, True)),
    ],
)
def test_a_server_is_named(name: str, has_selectors: bool, has_setinfo: bool) -> None:
    assert acl.Server.named(name) == acl.Server(has_selectors, has_setinfo)


@pytest.mark.parametrize("name", ["", "7.0", "redis", "redis-5", "redis-6.0", "keydb-6", "redis-x"])
def test_another_is_refused(name: str) -> None:
    with pytest.raises(InvalidArgumentError, match="server"):
        acl.Server.named(name)


def test_without_selectors_a_reader_is_one_by_its_commands_alone() -> None:
    words = acl.rule("reader", StoreSettings(), acl.Server.named("redis-6.2"))

    assert "~{agents}:*" in words
    assert not [word for word in words if word[0] in "(%"]
    assert not {"+publish", "+get", "+set", "+hset"} & {*words}


def test_another_database_is_selected() -> None:
    assert "+select" in acl.rule("worker", StoreSettings(), database=3)
    assert "+select" not in acl.rule("worker", StoreSettings())


@pytest.mark.parametrize("user", ["", "a b", "a\nb", "a:b", "x" * 101])
def test_a_users_name_is_one_word(user: str) -> None:
    with pytest.raises(InvalidArgumentError, match="user"):
        acl.setuser(user, [], None)
