"""The README's code works: each block is executed, on a real server."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import pytest
import redis

from sessionstore import SessionStore
from sessionstore._server import PrivateServer

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text("utf-8")
EXAMPLE_URL = "redis://localhost:6379"


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


PYTHON = blocks("python")
COMMANDS = [line[2:] for b in blocks("console") for line in b.splitlines() if line[:2] == "$ "]
REDIS_CLI = [
    line.partition(" #")[0].strip()
    for block in blocks("sh")
    for line in block.splitlines()
    if line.startswith("redis-cli ")
]


@pytest.fixture
def environment(server: PrivateServer) -> Iterator[dict[str, str]]:
    """The server of the examples, a namespace, and the id of a session to look at."""
    namespace = f"readme-{uuid4().hex[:8]}"
    with SessionStore.from_url(server.url, namespace=namespace) as store:
        session = store.create_session("claude", "service-1", "/src", status="terminated")
        store.add_output(session.id, "hello")
    yield {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "SESSIONSTORE_URL": server.url,
        "SESSIONSTORE_NAMESPACE": namespace,
        "ID": session.id,
    }
    with redis.Redis.from_url(server.url) as client:
        for key in client.scan_iter(f"{{{namespace}}}:*"):
            client.unlink(key)


def test_the_readme_has_its_examples() -> None:
    assert len(PYTHON) >= 5
    assert len(COMMANDS) >= 7
    assert len(REDIS_CLI) >= 5


@pytest.mark.parametrize("number", range(len(PYTHON)))
def test_python_works(number: int, server: PrivateServer, environment: dict[str, str]) -> None:
    code = PYTHON[number].replace(EXAMPLE_URL, server.url)
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        env=environment, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_the_command_line_works(environment: dict[str, str]) -> None:
    for command in COMMANDS:
        done = subprocess.run(
            ["sh", "-c", command], env=environment, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, f"{command}\n{done.stderr}"


def test_redis_cli_shows_what_it_says(server: PrivateServer, environment: dict[str, str]) -> None:
    with redis.Redis.from_url(server.url, decode_responses=True) as client:
        for line in REDIS_CLI:
            line = line.replace("$ID", environment["ID"])
            line = line.replace("{agents}", f"{{{environment['SESSIONSTORE_NAMESPACE']}}}")
            _, *words = shlex.split(line)
            for word in words:
                if ":" in word and not word.endswith((":busy", ":error")):
                    assert client.exists(word), f"{line}: there is no {word}"
            client.execute_command(*words)


def test_the_guarantees_name_tests_that_exist() -> None:
    named = set(re.findall(r"`(tests/\w+\.py)`", README))
    assert named
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []


def test_every_setting_is_in_the_readme() -> None:
    from sessionstore import StoreSettings

    for name in StoreSettings.model_fields:
        assert f"| `{name}` |" in README


def test_every_public_method_is_in_the_readme() -> None:
    public = [name for name in dir(SessionStore) if not name.startswith("_")]
    hidden = ("carry", "drain", "execute", "follow", "from_url", "worker")
    methods = [name for name in public if name not in hidden]
    assert [name for name in methods if f"`{name}(" not in README] == []
