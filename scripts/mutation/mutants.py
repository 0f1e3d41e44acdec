"""One damaged copy of the package at a time, and whether its tests notice."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from damages import MODEL, Damage

ROOT = Path(__file__).parents[2]
LUA = Path("sessionstore") / "lua"
#: One world of all is enough for a mistake in Lua: a blocking store, one partition, a real server.
ONE_WORLD = "not async and not fakeredis and not 16 and not cluster and not sentinel"
TIMEOUT = 180.0  # seconds for one file of tests
PASSED, FAILED = 0, 1  # pytest's exit codes


class NotFoundOnceError(Exception):
    """A damage's text is not in its file, or is there several times."""


@dataclass(frozen=True, slots=True)
class Result:
    """What became of a damage: the file of tests that noticed it, and how long that took."""

    damage: Damage
    killed_by: str | None
    seconds: float
    trouble: str = ""


def damaged(damage: Damage, text: str) -> str:
    """A file's text with the damage done to it."""
    found = text.count(damage.text)
    if found != 1:
        raise NotFoundOnceError(f"{damage.file}: {damage.text!r} is there {found} times, not once")
    return text.replace(damage.text, damage.becomes)


def check_texts(damages: Iterable[Damage]) -> None:
    """Every damage can be done.

    Raises:
        NotFoundOnceError: one cannot; the scripts have changed, and it must follow them.
    """
    for damage in damages:
        damaged(damage, (ROOT / LUA / damage.file).read_text("utf-8"))


def run_tests(package: Path, file: str, server: str) -> tuple[int, str]:
    """pytest's exit code with the package of a folder, and the end of what it printed."""
    others = {"redis": "valkey", "valkey": "redis"}[server]
    chosen = f"{ONE_WORLD} and not {others}"
    plugins = ["-p", "no:cacheprovider", "-p", "no:xdist"]
    options = ["-x", "-q", *plugins, "--every-server", "-k", chosen]
    if file == MODEL:
        options += ["--model-as-found"]
    environment = os.environ | {"PYTHONPATH": str(package), "PYTHONDONTWRITEBYTECODE": "1"}
    process = subprocess.Popen(
        # -P: the package in the current folder is not the one to be tested.
        [sys.executable, "-P", "-m", "pytest", str(ROOT / "tests" / file), *options],
        cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    try:
        printed, _ = process.communicate(timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        return FAILED, "it took too long"
    return process.returncode, printed[-2000:]


def copied(folder: Path) -> Path:
    """A copy of the package in a folder."""
    package = folder / "sessionstore"
    shutil.copytree(ROOT / "sessionstore", package, ignore=shutil.ignore_patterns("__pycache__"))
    return package


def tried(damage: Damage, server: str) -> Result:
    """Do the damage to a copy and run its tests until one fails."""
    began = time.monotonic()
    with TemporaryDirectory(prefix="mutant-") as folder:
        copied(Path(folder))
        script = Path(folder) / LUA / damage.file
        script.write_text(damaged(damage, script.read_text("utf-8")), "utf-8")
        for file in damage.tests:
            code, printed = run_tests(Path(folder), file, server)
            if code not in (PASSED, FAILED):  # not the tests' answer: somebody has broken it off
                code, printed = run_tests(Path(folder), file, server)
            if code == FAILED:
                return Result(damage, file, time.monotonic() - began)
            if code != PASSED:
                trouble = f"pytest ended with {code}: {printed}"
                return Result(damage, None, time.monotonic() - began, trouble)
    return Result(damage, None, time.monotonic() - began)


def failing_without_damage(files: Sequence[str], server: str, jobs: int) -> dict[str, str]:
    """Files of tests that fail on an undamaged copy: what they would kill proves nothing."""
    with TemporaryDirectory(prefix="mutant-") as folder, ThreadPoolExecutor(jobs) as pool:
        copied(Path(folder))
        results = pool.map(lambda file: run_tests(Path(folder), file, server), files)
        return {
            file: printed
            for file, (code, printed) in zip(files, results, strict=True)
            if code != PASSED
        }
