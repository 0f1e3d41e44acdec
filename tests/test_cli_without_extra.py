"""The library without typer and rich: it works, and the command line says how to get them."""

from __future__ import annotations

import subprocess
import sys

import pytest

CLI_ONLY = ("typer", "rich", "click", "shellingham")


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("missing", ["typer", "rich"])
def test_the_bare_command_says_in_one_line_how_to_get_the_rest(missing: str) -> None:
    finished = python(
        f"import sys; sys.modules[{missing!r}] = None\n"
        "from sessionstore.cli import main\n"
        "sys.exit(main())"
    )
    assert finished.returncode == 1
    assert finished.stdout == ""
    assert finished.stderr.count("\n") == 1
    assert "pip install 'sessionstore[cli]'" in finished.stderr


def test_the_library_works_without_them() -> None:
    finished = python(
        f"import sys\nfor name in {CLI_ONLY!r}: sys.modules[name] = None\n"
        "from sessionstore.testing import memory_store\n"
        "import sessionstore, sessionstore._server, sessionstore.lines\n"
        "with memory_store() as store:\n"
        "    session = store.create_session('claude', 'service-1', '/src')\n"
        "    print(store.add_output(session.id, 'one', 'two'))"
    )
    assert (finished.returncode, finished.stdout, finished.stderr) == (0, "2\n", "")


def test_the_library_imports_none_of_them() -> None:
    finished = python(
        "import sys, sessionstore, sessionstore.testing, sessionstore._server, sessionstore.lines\n"
        f"print([name for name in {CLI_ONLY!r} if name in sys.modules])"
    )
    assert finished.stdout == "[]\n", finished.stderr
