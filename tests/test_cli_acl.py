"""``sessionstore acl`` through its real entry point, and the command line under its rules."""

from __future__ import annotations

import socket
import subprocess
from collections.abc import Iterator
from hashlib import sha256
from urllib.parse import urlsplit

import pytest
import redis
from commandline import CommandLine, Finished, command_line

from sessionstore._server import PrivateServer

PASSWORD = "s3cret, with # and ~ in it"


@pytest.fixture
def cli(server: PrivateServer) -> Iterator[CommandLine]:
    with command_line(server) as opened:
        yield opened
        for role in ("worker", "reader", "operator"):
            opened.redis.acl_deluser(f"{opened.namespace}-{role}")


def version(cli: CommandLine) -> str:
    info = cli.redis.info("server")
    return f"valkey-{info['valkey_version']}" if "valkey_version" in info else "redis-7.0"


def with_password(
    cli: CommandLine, *arguments: str, given: bytes = PASSWORD.encode(), **env: str
) -> Finished:
    process = cli.start("acl", *arguments, "--password-stdin", env={**env}, stdin=subprocess.PIPE)
    out, err = process.communicate(given)
    return Finished(process.wait(), out.decode(), err.decode())


def user_of(cli: CommandLine, role: str) -> dict[str, str | None]:
    """Set a user as the command line says; an environment in which it is the user."""
    told = with_password(cli, "--role", role, "--server", version(cli), given=b"pw-of-the-user\n")
    assert (told.code, told.err) == (0, "")
    address = urlsplit(cli.url).port
    with socket.create_connection(("127.0.0.1", address or 0), 5) as connection:
        connection.sendall(told.out.encode())  # as redis-cli takes a line from a pipe
        assert connection.recv(1000) == b"+OK\r\n"
    user = f"{cli.namespace}-{role}:pw-of-the-user@"
    return {"SESSIONSTORE_URL": cli.url.replace("redis://", f"redis://{user}")}


# ---- What it prints -----------------------------------------------------------------------------


@pytest.mark.parametrize("end", [b"", b"\n", b"\r\n"])
def test_the_password_is_hashed_and_shown_nowhere(cli: CommandLine, end: bytes) -> None:
    told = with_password(cli, "--role", "worker", given=PASSWORD.encode() + end)

    assert (told.code, told.err, told.out.count("\n")) == (0, "", 1)
    hashed = sha256(PASSWORD.encode()).hexdigest()
    assert told.out.startswith(f"ACL SETUSER {cli.namespace}-worker reset on #{hashed} ")
    assert PASSWORD not in told.out


def test_without_a_password_the_user_stays_off_and_that_is_said(cli: CommandLine) -> None:
    told = cli.run("acl", "--role", "worker", "--user", "w1")

    assert told.code == 0
    assert told.out.startswith(f"ACL SETUSER w1 reset off resetchannels ~{{{cli.namespace}}}:* ")
    assert told.err == "user 'w1' stays off: give it a password with --password-stdin\n"


def test_namespace_partitions_cluster_and_database_are_those_of_the_settings(
    cli: CommandLine,
) -> None:
    env: dict[str, str | None] = {
        "SESSIONSTORE_PARTITIONS": "16",
        "SESSIONSTORE_CLUSTER": "1",
    }
    told = cli.run("acl", "--role", "worker", "--namespace", "a:b.c", env=env)
    assert told.out.startswith(
        "ACL SETUSER a-b.c-worker reset off resetchannels ~{a:b.c}:* ~{a:b.c/[0-9a-f][0-9a-f]}:* "
        "&{a:b.c}:* &{a:b.c/[0-9a-f][0-9a-f]}:* +asking +client|setinfo +cluster|slots +command "
    )
    assert "+select" not in cli.run("acl", "--role", "worker").out
    elsewhere = cli.run("acl", "--role", "worker", env={"SESSIONSTORE_URL": "redis://h:1/3"})
    assert "+select" in elsewhere.out


def test_it_needs_no_server(cli: CommandLine) -> None:
    told = cli.run("acl", "--role", "reader", env={"SESSIONSTORE_URL": None})
    assert told.code == 0


def test_the_rule_is_that_of_a_version(cli: CommandLine) -> None:
    rules = [
        cli.run("acl", "--role", "reader", "--server", one).out
        for one in ("redis-6.2", "redis-7.0", "redis-7.2", "valkey-8.1")
    ]
    assert ["%R~" in one for one in rules] == [False, True, True, True]
    assert ["+client|setinfo" in one for one in rules] == [False, False, True, True]
    assert cli.run("acl", "--role", "reader").out == rules[-1]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "--role"),
        (["--role", "admin"], "--role"),
        (["--role", "reader", "--server", "redis-6.0"], "--server must be Redis 6.2 or newer"),
        (["--role", "reader", "--server", "latest"], "--server must be a name and a version"),
        (["--role", "reader", "--user", "a b"], "--user must be"),
        (["--role", "reader", "--namespace", "a*"], "namespace is not valid"),
        (["--role", "reader", "--password-stdin"], "there is no password on stdin"),
    ],
)
def test_what_is_wrong_is_said(cli: CommandLine, arguments: list[str], said: str) -> None:
    told = cli.run("acl", *arguments)
    assert (told.code, told.out) == (2, "")
    assert said in told.err
    assert "Traceback" not in told.err


def test_several_lines_are_no_password(cli: CommandLine) -> None:
    told = with_password(cli, "--role", "reader", given=b"one\ntwo\n")
    assert (told.code, told.out) == (2, "")
    assert "several lines" in told.err


# ---- Under its rules ----------------------------------------------------------------------------


def test_a_dashboard_looks_and_may_not_touch(cli: CommandLine) -> None:
    reader = user_of(cli, "reader")
    assert cli.run("ls", env=reader).code == 0  # before any worker has come
    own = cli.store.create_session("claude", "s", "/src").id
    cli.store.add_output(own, "hello")

    looks = (["ls"], ["show", own], ["logs", own], ["metrics"], ["export"])
    assert [cli.run(*one, env=reader).code for one in looks] == [0] * len(looks)
    for touch in (["rm", own], ["reap"], ["doctor"], ["run", "--type", "claude", "--", "true"]):
        told = cli.run(*touch, env=reader)
        assert told.code == 1, touch
        assert told.err.startswith("error: ")
        assert told.err.count("\n") == 1
        assert "can't run this command" in told.err or "no permissions" in told.err
    assert cli.store.get_session(own).output_buffer == ("hello",)


def test_a_worker_runs_and_an_operator_mends(cli: CommandLine) -> None:
    worker, operator = user_of(cli, "worker"), user_of(cli, "operator")

    assert cli.run("run", "--type", "claude", "--", "echo", "hello", env=worker).code == 0
    assert cli.run("reap", "--ended-for", "1h", env=worker).code == 0
    assert cli.run("doctor", env=worker).code == 1
    exported = cli.run("export", env=worker).out
    assert cli.run("doctor", "--repair", env=operator).code == 0
    process = cli.start("import", "-", env=operator, stdin=subprocess.PIPE)
    process.communicate(exported.encode())
    assert process.wait() == 0


@pytest.fixture(autouse=True)
def _no_denials_are_left(server: PrivateServer) -> Iterator[None]:
    yield
    with redis.Redis.from_url(server.url) as client:
        client.acl_log_reset()
