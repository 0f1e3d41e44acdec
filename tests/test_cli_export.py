"""``sessionstore export`` and ``sessionstore import``, through the real entry point."""

from __future__ import annotations

import json
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from commandline import CommandLine, command_line
from conftest import SERVERS
from consistency import assert_consistent
from prestarted import PROGRAM
from rawkeys import RawKeys

from sessionstore import Imported
from sessionstore._server import PrivateServer


@pytest.fixture
def cli(running: Callable[[str], PrivateServer]) -> Iterator[CommandLine]:
    with command_line(running(SERVERS[0])) as opened:
        yield opened


@pytest.fixture
def other(running: Callable[[str], PrivateServer]) -> Iterator[CommandLine]:
    """A second, empty namespace."""
    with command_line(running(SERVERS[0])) as opened:
        yield opened


@pytest.fixture
def file(cli: CommandLine, tmp_path: Path) -> Path:
    """An export of two sessions."""
    for type, status in (("claude", "active"), ("codex", "error")):
        own = cli.store.create_session(type, "s", "/src", "task", status=status)  # type: ignore[arg-type]
        cli.store.add_output(own.id, "one \x1b[2J", "two")
        cli.store.add_error(own.id, "oops")
    path = tmp_path / "agents.jsonl"
    with path.open("w") as stream:
        stream.writelines(cli.store.export_sessions())
    return path


def test_what_is_exported_is_imported(cli: CommandLine, other: CommandLine, file: Path) -> None:
    exported = cli.run("export", "--output", str(file), "--force")
    assert (exported.code, exported.out) == (0, "")
    assert exported.err == (
        f"exported 2 sessions to {file}, with 4 entries of output and 2 of errors\n"
    )
    would = other.run("import", str(file), "--dry-run")
    assert (would.code, would.out, would.err) == (0, "would import 2 sessions\n", "")
    assert other.store.get_metrics().total_sessions == 0

    done = other.run("import", str(file))
    assert (done.code, done.out, done.err) == (0, "imported 2 sessions\n", "")
    again = other.run("import", str(file), "--json")
    assert json.loads(again.out) == {
        **Imported(unchanged=2).model_dump(), "differing_ids": [],
    }  # fmt: skip
    assert [one.output_buffer for one in other.store.get_all_sessions()] == [
        one.output_buffer for one in cli.store.get_all_sessions()
    ]
    assert_consistent(RawKeys(other.redis, other.namespace))


@pytest.mark.usefixtures("file")
def test_a_pipe_joins_them(cli: CommandLine, other: CommandLine) -> None:
    exported = cli.run("export", "--type", "claude", "--status", "active,busy", "--task", "task")
    assert exported.err == "exported 1 session, with 2 entries of output and 1 of errors\n"
    imported = subprocess.run(
        [PROGRAM, "import", "-"],
        input=exported.out.encode(), capture_output=True, env=other.environment(), timeout=60,
    )  # fmt: skip
    assert (imported.returncode, imported.stdout) == (0, b"imported 1 session\n")
    assert [one.type for one in other.store.get_all_sessions()] == ["claude"]


def test_a_file_that_is_there_is_kept(cli: CommandLine, file: Path) -> None:
    before = file.read_bytes()
    refused = cli.run("export", "--output", str(file), "--type", "codex")
    assert (refused.code, refused.err) == (
        1,
        f"error: {file} exists already; --force replaces it\n",
    )
    assert file.read_bytes() == before
    assert cli.run("export", "--output", str(file), "--type", "codex", "--force").code == 0
    assert len(file.read_text().splitlines()) == 6
    assert sorted(file.parent.iterdir()) == [file]


def test_a_session_that_differs_is_told_of(other: CommandLine, file: Path) -> None:
    with file.open() as lines:
        other.store.import_sessions(lines)
    first, second = other.store.get_all_sessions()
    other.store.add_output(first.id, "more")
    other.store.delete_session(second.id)

    refused = other.run("import", str(file))
    assert refused.code == 1
    assert refused.err == (
        f"error: line 5: session '{first.id}' exists here already and differs; nothing of it was "
        "changed; --existing skip leaves such sessions as they are, replace replaces them\n"
    )
    skipped = other.run("import", str(file), "--existing", "skip")
    assert (skipped.code, skipped.out) == (
        0, "imported 1 session, 1 there already and different, left as they are\n",
    )  # fmt: skip
    assert skipped.err == f"warning: line 5: session '{first.id}' exists here and differs\n"
    replaced = other.run("import", str(file), "--existing", "replace")
    assert replaced.out == "imported 0 sessions, replaced 1, 1 there already\n"
    assert other.store.get_session(first.id).output_total == 2


def test_what_cannot_be_read_is_told_of(cli: CommandLine, other: CommandLine, file: Path) -> None:
    first, _ = cli.store.get_all_sessions()
    cli.redis.set(f"{{{cli.namespace}}}:session:{first.id}", "spoilt")
    exported = cli.run("export", "--output", str(file), "--force")
    assert exported.code == 1
    assert f"warning: session '{first.id}' is not in the export: one of its keys" in exported.err
    assert exported.err.endswith("; left out 1 session that cannot be read\n")
    imported = other.run("import", str(file))
    assert (imported.code, imported.out) == (
        1, "imported 1 session; left out 1 session that cannot be read\n",
    )  # fmt: skip
    assert f"warning: line 2: session '{first.id}' cannot be imported" in imported.err


def test_a_file_that_is_no_export_is_refused(other: CommandLine, file: Path) -> None:
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[:5]))
    cut_off = other.run("import", str(file))
    assert (cut_off.code, cut_off.out) == (1, "")
    assert cut_off.err == (
        "error: line 5: the export is cut off after this line; what was complete is imported\n"
    )
    file.write_text("\x1b[2J\n")
    refused = other.run("import", str(file))
    assert (refused.code, refused.err) == (1, "error: line 1: this is no export of sessionstore\n")


def test_usage(cli: CommandLine, tmp_path: Path) -> None:
    gone = cli.run("import", str(tmp_path / "none"))
    assert (gone.code, gone.err) == (1, f"error: {tmp_path}/none: No such file or directory\n")
    assert cli.run("import", "-", "--existing", "merge").code == 2
    unreachable = cli.run("export", "--timeout", "0.2", "--url", "redis://127.0.0.1:1")
    assert (unreachable.code, unreachable.out) == (4, "")


def test_an_export_that_fails_leaves_no_file(cli: CommandLine, tmp_path: Path) -> None:
    failed = cli.run("export", "-o", str(tmp_path / "x"), "--type", "Nothing!")
    assert failed.code == 2
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_import_goes_on(other: CommandLine, file: Path) -> None:
    lines = file.read_bytes().splitlines(keepends=True)
    process = other.start("import", "-", stdin=subprocess.PIPE)
    assert process.stdin is not None
    process.stdin.write(b"".join(lines[:7]))
    process.stdin.flush()
    while not other.store.get_metrics().total_sessions:
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 130
    assert process.communicate()[1] == (
        b"interrupted; the same command goes on where this one stopped\n"
    )
    with file.open() as again:
        assert other.store.import_sessions(again) == Imported(imported=1, unchanged=1)


def test_a_terminal_shows_a_bar_that_goes_away(
    cli: CommandLine, other: CommandLine, file: Path
) -> None:
    shown = cli.on_terminal("export", "--output", str(file), "--force").out
    assert "exporting" in shown
    assert "2/2" in shown
    assert "exported 2 sessions" in shown
    shown = other.on_terminal("import", str(file)).out
    assert "importing" in shown
    assert "imported 2 sessions" in shown
    plain = cli.on_terminal("export")  # the lines go there: no bar among them
    assert "exporting" not in plain.out
    assert "\x1b" not in plain.out
