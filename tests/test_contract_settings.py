"""Settings, opening a store, the clients it takes, and what it logs."""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import Callable, Iterator
from typing import Any

import fakeredis.aioredis
import pytest
import redis
import redis.asyncio
from conftest import Awaiting, on_one_server
from faults import Fault, FaultProxy
from rawkeys import plain_client

from sessionstore import (
    AsyncSessionStore,
    InvalidArgumentError,
    OutcomeUnknownError,
    SchemaMismatchError,
    SessionStore,
    SessionStoreError,
    StoreSettings,
    UnsafeServerError,
    __version__,
)
from sessionstore._server import PrivateServer

NOBODY = "redis://127.0.0.1:1/0"

# ---- Settings ----------------------------------------------------------------------------------

DEFAULTS = {
    "namespace": "agents",
    "buffer_limit": 10_000,
    "buffer_bytes": 8 * 1024 * 1024,
    "chunk_limit": 1024 * 1024,
    "types": None,
    "partitions": 1,
    "deadline": 10.0,
    "wait_replicas": 0,
    "max_connections": 50,
    "allow_eviction": False,
    "cluster": False,
    "coalesce": True,
    "worker": "",
    "reap_grace": 10.0,
    "retention": None,
}

#: name → (in the environment, as a value)
OTHERS: dict[str, tuple[str, Any]] = {
    "namespace": ("team-1.dev:x", "team-1.dev:x"),
    "buffer_limit": ("0", 0),
    "buffer_bytes": ("1000", 1000),
    "chunk_limit": ("1", 1),
    "types": ("claude, codex", frozenset({"claude", "codex"})),
    "partitions": ("16", 16),
    "deadline": ("2.5", 2.5),
    "wait_replicas": ("2", 2),
    "max_connections": ("1", 1),
    "allow_eviction": ("true", True),
    "cluster": ("1", True),
    "coalesce": ("false", False),
    "worker": ("builder-1.a_b", "builder-1.a_b"),
    "reap_grace": ("0.5", 0.5),
    "retention": ("86400", 86400.0),
}

BAD: list[tuple[str, Any]] = [
    ("namespace", ""),
    ("namespace", "a{b}"),
    ("namespace", "a b"),
    ("namespace", "x" * 65),
    ("namespace", "x\n"),
    ("namespace", 5),
    ("buffer_limit", -1),
    ("wait_replicas", -1),
    ("buffer_limit", "many"),
    ("buffer_limit", 1.5),
    ("buffer_limit", None),
    ("buffer_bytes", -1),
    ("buffer_bytes", "8 MiB"),
    ("chunk_limit", 0),
    ("chunk_limit", 64 * 1024 * 1024 + 1),
    ("types", 5),
    ("types", [5]),
    ("partitions", 0),
    ("partitions", 2),
    ("partitions", "many"),
    ("deadline", 0),
    ("deadline", -1),
    ("deadline", 61),
    ("deadline", float("nan")),
    ("deadline", "soon"),
    ("max_connections", 0),
    ("max_connections", "x"),
    ("allow_eviction", "maybe"),
    ("worker", "a b"),
    ("worker", "a:b"),
    ("worker", "x" * 65),
    ("worker", "x\n"),
    ("worker", None),
    ("reap_grace", 0),
    ("reap_grace", -1),
    ("reap_grace", 3601),
    ("reap_grace", float("nan")),
    ("reap_grace", "a while"),
    ("reap_grace", None),
    ("retention", -1),
    ("retention", 1e10),
    ("retention", float("inf")),
    ("retention", float("nan")),
    ("retention", "for ever"),
]


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("URL", *(name.upper() for name in DEFAULTS)):
        monkeypatch.delenv(f"SESSIONSTORE_{name}", raising=False)


@pytest.fixture(params=["sync", "async"])
def from_url(request: pytest.FixtureRequest) -> Iterator[Callable[..., Any]]:
    """``from_url`` of each store; what it opens is closed at the end."""
    stores: list[Any] = []
    with asyncio.Runner() as runner:

        def opened(url: str, **settings: Any) -> Any:
            if request.param == "sync":
                store: Any = SessionStore.from_url(url, **settings)
            else:
                store = Awaiting(AsyncSessionStore.from_url(url, **settings), runner)
            stores.append(store)
            return store

        yield opened
        for store in stores:
            store.close()


def test_defaults() -> None:
    assert StoreSettings.load().model_dump() == DEFAULTS
    assert set(OTHERS) == set(DEFAULTS)


@pytest.mark.parametrize("name", sorted(OTHERS))
def test_a_setting_from_the_environment(
    from_url: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    text, value = OTHERS[name]
    monkeypatch.setenv(f"SESSIONSTORE_{name.upper()}", text)
    store = from_url(NOBODY)
    settings = getattr(store, "store", store).settings
    assert settings.model_dump() == DEFAULTS | {name: value}


@pytest.mark.parametrize("name", sorted(OTHERS))
def test_an_argument_wins_over_the_environment(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(f"SESSIONSTORE_{name.upper()}", "not even valid !{}")
    assert StoreSettings.load(**{name: OTHERS[name][1]}).model_dump()[name] == OTHERS[name][1]


@pytest.mark.parametrize("name", sorted(OTHERS))
def test_an_empty_variable_is_none_at_all(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(f"SESSIONSTORE_{name.upper()}", "")
    assert StoreSettings.load().model_dump() == DEFAULTS


@pytest.mark.parametrize(("name", "value"), BAD)
def test_a_bad_setting_is_named(from_url: Callable[..., Any], name: str, value: Any) -> None:
    with pytest.raises(InvalidArgumentError, match=f"^{name} is not valid: ") as refused:
        from_url(NOBODY, **{name: value})
    assert refused.value.argument == name


@pytest.mark.parametrize(
    ("name", "value"), [(n, v) for n, v in BAD if isinstance(v, str) and v and n != "types"]
)
def test_a_bad_variable_is_named(
    from_url: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    variable = f"SESSIONSTORE_{name.upper()}"
    monkeypatch.setenv(variable, value)
    with pytest.raises(InvalidArgumentError, match=f"^{variable} is not valid: "):
        from_url(NOBODY)


def test_a_setting_that_does_not_exist_is_named(from_url: Callable[..., Any]) -> None:
    with pytest.raises(InvalidArgumentError, match=r"^buffer_size is not valid"):
        from_url(NOBODY, buffer_size=5)


def test_settings_cannot_be_changed_later() -> None:
    with pytest.raises(ValueError, match="frozen"):
        StoreSettings.load().namespace = "other"  # type: ignore[misc]


@pytest.mark.parametrize("store_class", [SessionStore, AsyncSessionStore])
def test_without_a_client_or_a_url_the_variable_is_named(store_class: type[Any]) -> None:
    with pytest.raises(InvalidArgumentError, match="SESSIONSTORE_URL is not set"):
        store_class()


@pytest.mark.parametrize("url", ["", "localhost", "http://localhost", "redis://localhost:port"])
def test_a_bad_url_is_refused(from_url: Callable[..., Any], url: str) -> None:
    with pytest.raises(InvalidArgumentError, match=r"^url is not valid: "):
        from_url(url)


def test_a_bad_url_is_refused_without_its_password(from_url: Callable[..., Any]) -> None:
    with pytest.raises(InvalidArgumentError) as refused:
        from_url("rediss+x://user:hunter2@localhost:port/0")
    assert "hunter2" not in str(refused.value)


@pytest.mark.parametrize("style", ["sync", "async"])
def test_the_url_from_the_environment(
    server: Any, monkeypatch: pytest.MonkeyPatch, style: str
) -> None:
    monkeypatch.setenv("SESSIONSTORE_URL", server.url)

    async def ping() -> bool:
        async with AsyncSessionStore() as store:
            return await store.ping()

    if style == "async":
        assert asyncio.run(ping()) is True
    else:
        with SessionStore() as store:
            assert store.ping() is True
    # Opening has stamped the layout of the default namespace, which no other test uses.
    with redis.Redis.from_url(server.url) as client:
        assert client.delete("{agents}:meta") == 1


@pytest.mark.parametrize("url", [None, 5, b"redis://localhost"])
def test_a_url_that_is_no_text_is_refused(from_url: Callable[..., Any], url: Any) -> None:
    with pytest.raises(InvalidArgumentError, match=r"^url must be a str, not "):
        from_url(url)


@pytest.mark.parametrize(
    ("store_class", "client", "rule"),
    [
        (SessionStore, redis.asyncio.Redis(), "must be a redis.Redis, not a redis.asyncio"),
        (AsyncSessionStore, redis.Redis(), "must be a redis.asyncio.Redis, not a redis.client"),
        (SessionStore, NOBODY, "must be a redis.Redis, not a builtins.str"),
        (AsyncSessionStore, NOBODY, "must be a redis.asyncio.Redis, not a builtins.str"),
    ],
)
def test_a_client_of_the_wrong_kind_is_refused(
    store_class: type[Any], client: Any, rule: str
) -> None:
    with pytest.raises(InvalidArgumentError, match=f"^client {rule}"):
        store_class(client)


def test_a_redact_that_is_no_function_is_refused(from_url: Callable[..., Any]) -> None:
    with pytest.raises(InvalidArgumentError, match=r"^redact must be a function"):
        from_url(NOBODY, redact="secret")


def test_a_redact_that_returns_no_text_is_refused(world: Any) -> None:
    store = world.store(redact=lambda chunk: chunk.encode())
    session_id = store.create_session("claude", "s", "/src").id
    with pytest.raises(InvalidArgumentError, match="redact must return a str"):
        store.add_output(session_id, "text")
    assert store.get_session(session_id).output_total == 0


@pytest.mark.parametrize("error", [None, ValueError("x"), OutcomeUnknownError("not of a store")])
def test_only_an_unknown_outcome_can_be_repeated(from_url: Callable[..., Any], error: Any) -> None:
    with pytest.raises(InvalidArgumentError, match=r"^error is not of this store"):
        from_url(NOBODY).repeat(error)


# ---- Opening -----------------------------------------------------------------------------------


def test_the_first_call_stamps_the_layout(world: Any, store: Any) -> None:
    assert world.redis.exists(world.meta) == 0
    store.get_metrics()
    assert world.redis.hgetall(world.meta) == {
        "schema": "1",
        "partitions": str(world.partitions),
        "written_by": __version__,
    }


@on_one_server
@pytest.mark.parametrize(
    "meta", [{"schema": "2", "partitions": "1"}, {"schema": "1", "partitions": "256"}, {"x": "y"}]
)
def test_a_namespace_of_another_layout_is_not_touched(
    world: Any, store: Any, meta: dict[str, str]
) -> None:
    world.redis.hset(world.meta, mapping=meta)
    for _ in range(2):  # refused each time, not just the first
        with pytest.raises(SchemaMismatchError, match="nothing was written"):
            store.create_session("claude", "s", "/src")
        with pytest.raises(SchemaMismatchError):
            store.get_metrics()
    assert world.keys() == {"meta"}
    assert world.redis.hgetall(world.meta) == meta


def test_namespaces_do_not_see_each_other(world: Any, store: Any) -> None:
    other = world.store(namespace=f"{world.namespace}-2")
    session = other.create_session("claude", "s", "/src")
    assert store.get_all_sessions() == []
    assert store.find_session(session.id) is None
    assert other.get_session(session.id).id == session.id
    for key in world.redis.scan_iter(f"{{{world.namespace}-2}}:*"):
        world.redis.unlink(key)


def _full(server: Any, policy: str) -> None:
    with redis.Redis.from_url(server.url) as client:
        client.config_set("maxmemory", "100mb")
        client.config_set("maxmemory-policy", policy)


@pytest.mark.parametrize("policy", ["allkeys-lru", "allkeys-random"])
def test_a_server_that_evicts_any_key_is_refused(
    own_server: Any, from_url: Callable[..., Any], policy: str
) -> None:
    _full(own_server, policy)
    store = from_url(own_server.url)
    with pytest.raises(UnsafeServerError, match=policy):
        store.create_session("claude", "s", "/src")
    allowed = from_url(own_server.url, allow_eviction=True)
    assert allowed.create_session("claude", "s", "/src").type == "claude"


def test_a_server_that_evicts_only_expiring_keys_is_warned_of(
    own_server: Any, from_url: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    _full(own_server, "volatile-lru")
    store = from_url(own_server.url)
    store.get_metrics()
    store.get_metrics()
    warnings = [r for r in caplog.records if r.name == "sessionstore"]
    assert [r.levelname for r in warnings] == ["WARNING"]
    assert "volatile-lru" in warnings[0].getMessage()


def test_a_server_is_looked_at_again_when_a_connection_has_failed(
    own_server: PrivateServer, from_url: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    def cut_off() -> int:
        """A call whose connection fails; how many warnings there have been by the next."""
        proxy.plan([Fault.LOSE_REQUEST])
        store.update_activity(own)
        store.get_metrics()
        return len([r for r in caplog.records if r.levelname == "WARNING"])

    with FaultProxy(own_server.port) as proxy:
        store = from_url(proxy.url)
        own = store.create_session("claude", "s", "/src").id
        assert cut_off() == 0
        _full(own_server, "volatile-lru")
        assert [cut_off(), cut_off()] == [1, 1]  # said once
        _full(own_server, "allkeys-lru")
        with pytest.raises(UnsafeServerError, match="allkeys-lru"):
            cut_off()
        store.close()


def test_a_policy_without_a_memory_limit_is_no_danger(
    own_server: Any, from_url: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    with redis.Redis.from_url(own_server.url) as client:
        client.config_set("maxmemory-policy", "allkeys-lru")
    assert from_url(own_server.url).get_metrics().total_sessions == 0
    assert not [r for r in caplog.records if r.name == "sessionstore"]


# ---- Clients that are handed in ----------------------------------------------------------------


@pytest.mark.parametrize("protocol", [2, 3])
@pytest.mark.parametrize("decode_responses", [False, True])
@on_one_server
def test_any_client_gives_the_same_answers(
    world: Any, decode_responses: bool, protocol: int
) -> None:
    """Whether it answers in bytes or text, hashes as lists or dicts."""
    options = {"decode_responses": decode_responses, "protocol": protocol}
    client: Any
    if world.style == "sync":
        client = world.client(**options)
        store: Any = SessionStore(client, namespace=world.namespace, partitions=world.partitions)
    else:
        if world.url is None:
            client = fakeredis.aioredis.FakeRedis(server=world._fake, **options)
        else:
            client = plain_client(world.url, of=redis.asyncio, **options)
        store = Awaiting(AsyncSessionStore(client, namespace=world.namespace), world.runner)
    try:
        _assert_answers(store)
    finally:
        store.close()
        if world.style == "async":
            world.runner.run(client.aclose())


def _assert_answers(store: Any) -> None:
    created = store.create_session("claude", "sé", "/src", "t", "m", metadata={"a": "é"})
    assert store.add_output(created.id, "é", b"\xff", "") == 3
    store.add_error(created.id, "e")
    store.update_status(created.id, "busy", expected="active")
    store.update_metadata(created.id, {"b": "c"})
    whole = store.get_session(created.id)
    assert (whole.status, whole.metadata) == ("busy", {"a": "é", "b": "c"})
    assert (whole.output_buffer, whole.error_buffer) == (("é", "\ufffd", ""), ("e",))
    assert whole.created_at == created.created_at
    for found in (
        store.find_session_by_service_id("sé"),
        *store.get_all_sessions(),
        *store.get_sessions_by_type("claude"),
        *store.find_sessions(task_id="t", status="busy", tail=None),
    ):
        assert found.model_copy(update={"read_at": whole.read_at}) == whole
    assert store.get_session(created.id, tail=0).output_buffer == ()
    page = store.read_output(created.id, 1)
    assert (page.chunks, page.cursor) == (("\ufffd", ""), 3)
    assert store.get_metrics().sessions_by_type == {"claude": 1}
    assert store.ping() is True
    assert store.find_session("missing") is store.find_session("missing", tail=0) is None
    with pytest.raises(SessionStoreError, match="missing"):
        store.update_activity("missing")
    assert store.delete_session(created.id) is True


@pytest.mark.parametrize("style", ["sync", "async"])
def test_a_client_that_was_handed_in_is_not_closed(
    style: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed: list[str] = []

    async def open_and_close(client: redis.asyncio.Redis) -> None:
        async with AsyncSessionStore(client):
            pass

    client_class = redis.Redis if style == "sync" else redis.asyncio.Redis
    client: Any = client_class.from_url(NOBODY)
    for name in ("close", "aclose"):
        monkeypatch.setattr(client, name, lambda: closed.append("closed"), raising=False)
    if style == "sync":
        with SessionStore(client):
            pass
    else:
        asyncio.run(open_and_close(client))
    assert closed == []


def test_a_closed_store_says_so(world: Any, store: Any) -> None:
    store.get_metrics()
    store.close()
    with pytest.raises(SessionStoreError, match="closed"):
        store.get_metrics()
    with pytest.raises(SessionStoreError, match="closed"):
        store.create_session("claude", "s", "/src")
    store.close()
    assert world.keys() == {"meta"}


def test_a_store_that_cannot_be_reached_never_looks_empty(from_url: Callable[..., Any]) -> None:
    store = from_url(NOBODY, deadline=0.05)
    for read in (store.get_all_sessions, store.get_metrics, store.find_sessions, store.ping):
        with pytest.raises(redis.ConnectionError):
            read()
    with pytest.raises(redis.ConnectionError):
        store.find_session("agent_claude_x")


# ---- Logging -----------------------------------------------------------------------------------


def test_neither_output_nor_passwords_are_logged(
    own_server: Any, from_url: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    with redis.Redis.from_url(own_server.url) as client:
        client.config_set("requirepass", "hunter2")
    caplog.set_level(logging.DEBUG)
    address = own_server.url.removeprefix("redis://")
    store = from_url(f"redis://:hunter2@{address}")
    session = store.create_session("claude", "s", "/src", metadata={"m": "private-note"})
    store.add_output(session.id, "private-output")
    store.add_error(session.id, "private-error")
    store.get_all_sessions()
    own_server.kill()
    failing = from_url(f"redis://:hunter2@{address}", deadline=0.5)
    errors = []
    for write in (failing.add_output, failing.add_error):
        with pytest.raises(redis.RedisError) as failed:
            write(session.id, "private-output")
        errors.append(str(failed.value) + repr(failed.value))
    own = [r for r in caplog.records if r.name.startswith("sessionstore")]
    assert own, "the attempts that failed are logged"
    text = "\n".join([r.getMessage() for r in caplog.records] + errors + [repr(store)])
    assert "hunter2" not in text
    assert "private" not in text


def test_a_wrong_password_is_told_at_once_and_not_shown(
    own_server: Any, from_url: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    with redis.Redis.from_url(own_server.url) as client:
        client.config_set("requirepass", "right")
    caplog.set_level(logging.DEBUG)
    address = own_server.url.removeprefix("redis://")
    store = from_url(f"redis://:hunter2@{address}", deadline=60)
    with pytest.raises(redis.AuthenticationError) as failed:
        store.create_session("claude", "s", "/src")
    text = "\n".join([str(failed.value), *(r.getMessage() for r in caplog.records)])
    assert "hunter2" not in text


def test_options_of_the_url_do_not_undo_the_deadline_nor_the_encoding(
    from_url: Callable[..., Any], own_server: PrivateServer
) -> None:
    options = "?socket_timeout=60&encoding=latin-1&decode_responses=true"
    store = from_url(own_server.url + options, deadline=1)
    session = store.create_session("claude", "é", "/src")
    store.add_output(session.id, "é")
    assert store.get_session(session.id).output_buffer == ("é",)
    own_server.signal(signal.SIGSTOP)
    try:
        with pytest.raises(redis.TimeoutError):
            store.ping()  # for a minute, if the URL had its way
    finally:
        own_server.signal(signal.SIGCONT)
