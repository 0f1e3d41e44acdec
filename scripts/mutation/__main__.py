"""Damage the Lua scripts one by one, and see that the tests notice.

scripts/mutants [--only TEXT] [--jobs 2] [--server redis] [--figures FILE]
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from damages import DAMAGES
from mutants import Result, check_texts, failing_without_damage, tried


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="scripts/mutants", description="Does small damages to the Lua; the tests must notice."
    )
    parser.add_argument("--only", default="", help="damages with this in file or reason")
    parser.add_argument("--jobs", type=int, default=2, help="how many at the same time")
    parser.add_argument("--server", choices=("redis", "valkey"), default="redis")
    parser.add_argument("--figures", type=Path, help="append the counts as JSON, as attacks do")
    options = parser.parse_args()
    chosen = [one for one in DAMAGES if options.only in f"{one.file} {one.why}"]
    check_texts(DAMAGES)
    began = time.monotonic()
    files = sorted({file for damage in chosen for file in damage.tests})
    print(f"{len(files)} files of tests without damage …", flush=True)
    failing = failing_without_damage(files, options.server, options.jobs)
    for file, printed in failing.items():
        print(f"{file} fails without damage, or has no test to run:\n{printed}")
    if failing:
        return 1
    with ThreadPoolExecutor(options.jobs) as pool:
        results = list(pool.map(lambda one: shown(tried(one, options.server)), chosen))
    survived = [one for one in results if one.killed_by is None]
    print(
        f"{len(results) - len(survived)} of {len(results)} damages noticed, "
        f"in {(time.monotonic() - began) / 60:.1f} minutes"
    )
    if options.figures:
        counts = {"injected": len(results), "wrong": len(survived), "control": False}
        with options.figures.open("a", encoding="utf-8") as file:
            file.write(json.dumps(counts | {"seen": {}, "outcomes": {}}) + "\n")
    for one in survived:
        print(f"NOT NOTICED: {one.damage.file}: {one.damage.why}\n{one.trouble}")
    return 1 if survived else 0


def shown(result: Result) -> Result:
    """Print one line of the table."""
    damage, by = result.damage, result.killed_by or "NOBODY"
    print(f"{damage.file:32} {damage.why:66} {by:28} {result.seconds:5.1f} s", flush=True)
    return result


if __name__ == "__main__":
    sys.exit(main())
