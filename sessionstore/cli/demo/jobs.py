"""What the demo's workers do: real commands."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from sessionstore.cli.demo.worker import Job
from sessionstore.cli.failures import USAGE, CommandError

PACKAGE = Path(__file__).parents[2]
AGENT_TYPES = ("claude", "codex", "gemini")


def built_in_jobs(directory: Path) -> list[Job]:
    """Stand-ins for agents, and commands that are long, loud, broken or failing."""
    python = sys.executable
    copy = directory / "package"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
    commands: list[tuple[str, list[str]]] = [
        *(_agent("fix the parser", steps) for steps in (14, 9)),
        ("compile the package", [python, "-m", "compileall", "-f", str(copy)]),
        _agent("write the docs", 12),
        ("print 5,000 lines", [python, "-c", "for i in range(5000): print('line', i)"]),
        ("fail with exit code 3", ["sh", "-c", "echo trying; echo 'no such host' >&2; exit 3"]),
        _agent("review the change", 11),
        ("list a missing file", ["ls", "-l", "/no/such/file"]),
        ("trace imports to stderr", [python, "-X", "importtime", "-c", "import json, decimal"]),
        _agent("hunt a flaky test", 15),
        ("print bytes that are no UTF-8", ["sh", "-c", r"printf 'caf\351\nna\303\257ve\nno end'"]),
        ("count slowly", ["sh", "-c", "for i in 1 2 3 4 5 6; do echo $i; sleep 0.3; done"]),
        _agent("update the dependencies", 8),
        ("print nothing", ["true"]),
    ]
    if _in_git_repository():
        commands.insert(6, ("git log", ["git", "--no-pager", "log", "--stat", "-n", "200"]))
    return [_job(n, title, command) for n, (title, command) in enumerate(commands)]


def jobs_from(file: Path) -> list[Job]:
    """A user's own commands: one a line for the shell; blank lines and # comments are skipped."""
    try:
        lines = [line.strip() for line in file.read_text("utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise CommandError(USAGE, f"{file} cannot be read: {error}") from None
    commands = [line for line in lines if line and not line.startswith("#")]
    if not commands:
        raise CommandError(USAGE, f"{file} has no commands")
    return [_job(n, command, ["sh", "-c", command]) for n, command in enumerate(commands)]


def _agent(title: str, steps: int) -> tuple[str, list[str]]:
    return title, [sys.executable, "-m", "sessionstore.cli.demo.agent", title, str(steps)]


def _job(number: int, title: str, command: Sequence[str]) -> Job:
    return {
        "number": number,
        "title": title,
        "type": AGENT_TYPES[number % len(AGENT_TYPES)],
        "task_id": f"task-{number // 2}",
        "project_path": str(Path.cwd()),
        "command": list(command),
    }


def _in_git_repository() -> bool:
    try:
        answer = subprocess.run(["git", "log", "-1"], capture_output=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return answer.returncode == 0
