"""TLS: who is verified, what is refused, and how soon and how clearly.

The controls turn verification off: then what is refused elsewhere is let in.
"""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import Callable, Iterator
from typing import Any
from uuid import uuid4

import commandline
import pytest
import redis
from clusters import PrivateCluster
from conftest import CLUSTER, PROGRAMS, STYLES, Awaiting, World
from tls import Certificates, Front

from sessionstore import (
    AsyncSessionStore,
    InvalidArgumentError,
    OutcomeUnknownError,
    SessionStore,
)
from sessionstore._server import PrivateServer
from sessionstore.errors import is_transient, surely_not_run

DEADLINE = 10.0
UNREADABLE = "names a file that cannot be read: /not/there: No such file"
#: Refused at once: far from the 5.5 s in which attempts may begin.
AT_ONCE = 4.0
WRONG = {
    "of_another_name": "mismatch",
    "expired": "certificate has expired",
    "of_another_ca": "unable to get local issuer certificate",
}


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return Certificates(tmp_path_factory.mktemp("tls"))


@pytest.fixture
def front(server: PrivateServer, certificates: Certificates) -> Iterator[Front]:
    with Front(server.port, certificates.good) as front:
        yield front


@pytest.fixture
def strict(server: PrivateServer, certificates: Certificates) -> Iterator[Front]:
    """One that demands a certificate of the client."""
    with Front(server.port, certificates.good, certificates.ca) as front:
        yield front


def created(style: str, url: str, **settings: Any) -> str:
    """The id of a session that is created over a URL, and deleted."""
    settings = {"namespace": f"test-{uuid4().hex[:12]}", "deadline": DEADLINE} | settings
    with asyncio.Runner() as runner:
        opened: Any = (
            SessionStore.from_url(url, **settings)
            if style == "sync"
            else Awaiting(AsyncSessionStore.from_url(url, **settings), runner)
        )
        with opened as store:
            session_id: str = store.create_session("claude", "s", "/src").id
            store.delete_session(session_id)
            return session_id


def refusal(connecting: Callable[[], object]) -> tuple[redis.ConnectionError, float]:
    """What is raised, and after how many seconds."""
    began = time.monotonic()
    with pytest.raises(redis.ConnectionError) as caught:
        connecting()
    return caught.value, time.monotonic() - began


on_both_kinds = pytest.mark.parametrize("cluster", [False, True], ids=["single", "cluster"])
in_both_styles = pytest.mark.parametrize("style", ["sync", "async"])


@in_both_styles
@on_both_kinds
@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_certificate_is_refused_at_once(
    wrong: str, style: str, cluster: bool, front: Front, certificates: Certificates
) -> None:
    front.certificate = getattr(certificates, wrong)
    url = front.url(ssl_ca_certs=certificates.ca).replace("/0?", "?")
    error, seconds = refusal(lambda: created(style, url, cluster=cluster))
    assert WRONG[wrong].lower() in str(error).lower()
    assert seconds < AT_ONCE
    assert not is_transient(error)
    assert surely_not_run(error)
    assert front.taken == 1


@in_both_styles
@pytest.mark.parametrize("wrong", WRONG)
def test_control_without_verification_a_wrong_certificate_is_let_in(
    wrong: str,
    style: str,
    front: Front,
    certificates: Certificates,
    caplog: pytest.LogCaptureFixture,
) -> None:
    front.certificate = getattr(certificates, wrong)
    assert created(style, front.url(ssl_cert_reqs="none"))
    assert len([one for one in caplog.records if "ssl_cert_reqs=none" in one.message]) == 1


@in_both_styles
def test_control_without_the_check_of_the_name_another_name_is_let_in(
    style: str, front: Front, certificates: Certificates, caplog: pytest.LogCaptureFixture
) -> None:
    front.certificate = certificates.of_another_name
    url = front.url(ssl_ca_certs=certificates.ca, ssl_check_hostname="false")
    assert created(style, url)
    assert "ssl_check_hostname=false" in caplog.text
    front.certificate = certificates.of_another_ca  # but not another CA
    refusal(lambda: created(style, url))


@in_both_styles
def test_a_ca_that_is_not_named_is_not_trusted(style: str, front: Front) -> None:
    error, seconds = refusal(lambda: created(style, front.url()))
    assert "CERTIFICATE_VERIFY_FAILED" in str(error)
    assert seconds < AT_ONCE


@in_both_styles
def test_control_a_failure_of_the_connection_is_tried_again(
    style: str, front: Front, certificates: Certificates
) -> None:
    front.close()
    url = front.url(ssl_ca_certs=certificates.ca)
    error, seconds = refusal(lambda: created(style, url, deadline=2))
    assert is_transient(error)
    assert seconds > 0.5


@in_both_styles
@pytest.mark.parametrize("whose", [None, "of_another_ca"])
def test_a_client_without_the_right_certificate_is_refused(
    whose: str | None, style: str, strict: Front, certificates: Certificates
) -> None:
    options = {"ssl_certfile": getattr(certificates, whose)} if whose else {}
    began = time.monotonic()
    # TLS 1.3 tells at the first read. Whoever writes first may see a closed connection instead.
    with pytest.raises((redis.ConnectionError, OutcomeUnknownError)) as caught:
        created(style, strict.url(ssl_ca_certs=certificates.ca, **options))
    assert time.monotonic() - began < DEADLINE
    assert "alert" in str(caught.value).lower() or "EOF" in str(caught.value)


@in_both_styles
def test_a_client_with_a_certificate_of_the_ca_is_let_in(
    style: str, strict: Front, certificates: Certificates
) -> None:
    assert created(style, strict.url(ssl_ca_certs=certificates.ca, ssl_certfile=certificates.good))


@pytest.mark.parametrize(
    "reason",
    [
        "TLSV13_ALERT_CERTIFICATE_REQUIRED",
        "TLSV1_ALERT_UNKNOWN_CA",
        "SSLV3_ALERT_BAD_CERTIFICATE",
        "SSLV3_ALERT_CERTIFICATE_EXPIRED",
        "SSLV3_ALERT_HANDSHAKE_FAILURE",
        "CERTIFICATE_VERIFY_FAILED",
    ],
)
def test_a_refusal_by_certificate_is_not_transient(reason: str) -> None:
    cause = ssl.SSLError(1, f"[SSL: {reason}] (_ssl.c:1)")
    error = redis.ConnectionError("Error while reading")
    error.__context__ = cause
    assert not is_transient(error)
    assert surely_not_run(error)


def test_a_connection_that_is_cut_is_transient() -> None:
    error = redis.ConnectionError("Error 8 while writing to socket")
    error.__context__ = ssl.SSLEOFError(8, "EOF occurred in violation of protocol")
    assert is_transient(error)
    assert not surely_not_run(error)


@in_both_styles
def test_a_server_without_tls_is_an_error_within_the_deadline(
    style: str, server: PrivateServer, certificates: Certificates
) -> None:
    began = time.monotonic()
    with pytest.raises(redis.RedisError):
        created(
            style, f"rediss://localhost:{server.port}?ssl_ca_certs={certificates.ca}", deadline=2
        )
    assert time.monotonic() - began < 2


@in_both_styles
def test_a_server_with_tls_behind_a_plain_url_is_an_error_within_the_deadline(
    style: str, front: Front
) -> None:
    began = time.monotonic()
    with pytest.raises(redis.RedisError):
        created(style, front.url().replace("rediss:", "redis:"), deadline=2)
    assert time.monotonic() - began < 2


@in_both_styles
def test_a_certificate_that_is_replaced_goes_on_with_the_new_one(
    style: str, front: Front, certificates: Certificates
) -> None:
    url = front.url(ssl_ca_certs=certificates.ca)
    world = World(style, "tls", url)
    try:
        store = world.store()
        session_id = store.create_session("claude", "s", "/src").id
        front.certificate = certificates.issued(f"next-{style}")
        front.cut()
        assert store.add_output(session_id, "after") == 1
        front.certificate = certificates.of_another_ca  # control: the new one is verified too
        front.cut()
        with pytest.raises((redis.ConnectionError, OutcomeUnknownError), match="VERIFY_FAILED"):
            store.add_output(session_id, "more")
        front.certificate = certificates.good
    finally:
        world.close()


@pytest.mark.parametrize("cluster", [False, True])
@pytest.mark.parametrize("opening", [SessionStore.from_url, AsyncSessionStore.from_url])
@pytest.mark.parametrize("scheme", ["rediss://h", "rediss+sentinel://h/service"])
@pytest.mark.parametrize(
    ("query", "named"),
    [
        (
            "ssl_ca_certs=/not/there",
            f"ssl_ca_certs {UNREADABLE}",
        ),
        (
            "ssl_certfile=/not/there",
            f"ssl_certfile {UNREADABLE}",
        ),
        (
            "ssl_certfile={good}&ssl_keyfile=/not/there",
            f"ssl_keyfile {UNREADABLE}",
        ),
        ("ssl_keyfile={good}", "ssl_keyfile needs ssl_certfile"),
        ("ssl_certfile={ca}&ssl_password=hunter2", "does not go together"),
        ("ssl_certfile={good}&ssl_keyfile={expired}", "does not go together"),
        ("ssl_cert_reqs=maybe", "Flag: maybe"),
        ("ssl_ciphers=none-such", "of no use"),
        ("ssl_min_version=TLSv1_3", "is not valid|of no use"),  # by redis-py's version
    ],
)
def test_files_and_options_of_no_use_are_refused_when_the_store_is_made(
    query: str,
    named: str,
    scheme: str,
    opening: Any,
    cluster: bool,
    certificates: Certificates,
) -> None:
    if cluster and "sentinel" in scheme:
        return
    url = f"{scheme}?{query.format(**{k: str(v) for k, v in vars(certificates).items()})}"
    with pytest.raises(InvalidArgumentError, match=named) as caught:
        opening(url, cluster=cluster)
    assert "hunter2" not in str(caught.value)


def test_the_whole_programme_over_tls(front: Front, certificates: Certificates) -> None:
    for style in ("sync", "async"):
        world = World(style, "tls", front.url(ssl_ca_certs=certificates.ca))
        try:
            use(world)
        finally:
            world.close()


#: Between the two ports; not 10,000, for so far above the port for TLS is that of the bus.
BESIDE = 9_500


class _Node(PrivateServer):
    """A node with a port for TLS beside the plain one, which the tests use."""

    certificates: Certificates

    def command(self, port: int) -> list[str]:
        own = self.certificates
        return [
            *super().command(port),
            *("--tls-port", str(port - BESIDE), "--tls-auth-clients", "no", "--tls-cluster", "yes"),
            *("--tls-cert-file", str(own.good), "--tls-key-file", str(own.good)),
            *("--tls-ca-cert-file", str(own.ca)),
        ]


def _tls_port(node: PrivateServer) -> int:
    return node.port - BESIDE


@pytest.mark.parametrize("program", [name for name in PROGRAMS if name == "redis"])
@pytest.mark.parametrize("style", STYLES)
def test_a_cluster_of_nodes_with_tls(
    program: str, style: str, certificates: Certificates, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The servers' own TLS, also between them; each node's certificate is verified."""
    monkeypatch.setattr(_Node, "certificates", certificates, raising=False)
    with PrivateCluster(PROGRAMS[program], started=_Node, met_at=_tls_port) as cluster:
        port = _tls_port(cluster.nodes[0])
        world = World(style, CLUSTER, cluster.url, partitions=16)
        try:
            world.url = f"rediss://127.0.0.1:{port}?ssl_ca_certs={certificates.ca}"
            store = world.store()
            for number in range(20):
                store.create_session("claude", f"service-{number}", "/src")
            assert store.get_metrics().total_sessions == 20
            world.url = f"rediss://127.0.0.1:{port}?ssl_ca_certs={certificates.other_ca}"
            with pytest.raises(redis.ConnectionError, match="CERTIFICATE_VERIFY_FAILED"):
                world.store().get_metrics()
        finally:
            world.url = cluster.url
            world.close()


def use(world: World) -> None:
    """Every kind of operation, once."""
    store = world.store()
    one = store.create_session("claude", "s-1", "/src", task_id="t", metadata={"branch": "b"}).id
    two = store.create_session("codex", "s-2", "/src").id
    assert next(iter(store.watch("0"))).session_id == one
    with store.claim(one, ttl=5) as lease:
        assert store.get_session(one).owner == lease.owner
        with store.writer(one) as writer:
            for number in range(2000):
                print("line", number, "é" * 20, file=writer)
    store.add_error(two, "x" * 500_000)
    batch = store.batch()
    with batch if world.runner is None else Awaiting(batch, world.runner) as batch:
        added = batch.add_output(two, "a")
    assert added.result() == 1
    assert len(store.get_session(one).output_buffer) == 2000
    store.update_metadata(one, {"branch": None})
    store.update_status(one, "terminated")
    followed = [line for page in store.follow_output(one) for line in page.chunks]
    assert followed[-1].startswith("line 1999")
    assert {found.id for found in store.iter_sessions()} == {one, two}
    assert store.get_metrics().total_sessions == 2
    assert not [found for found in store.check() if not found.warning]
    assert store.delete_session(two)


@pytest.mark.parametrize("how", ["option", "environment"])
def test_a_refused_certificate_is_one_line_of_the_command_line(
    how: str, server: PrivateServer, front: Front, certificates: Certificates
) -> None:
    front.certificate = certificates.of_another_name
    url = front.url(ssl_ca_certs=certificates.ca)
    with commandline.command_line(server) as line:
        ended = (
            line.run("--url", url, "ls")
            if how == "option"
            else line.run("ls", env={"SESSIONSTORE_URL": url})
        )
        assert ended.code != 0
        assert ended.out == ""
        assert len(ended.err.splitlines()) == 1
        assert "certificate verify failed: Hostname mismatch" in ended.err
        assert str(certificates.ca) not in ended.err
        front.certificate = certificates.good  # control
        assert line.run("--url", url, "ls").code == 0
        missing = line.run("--url", front.url(ssl_ca_certs="/not/there"), "ls")
        assert missing.code != 0
        assert "/not/there: No such file" in missing.err
        assert len(missing.err.splitlines()) == 1
