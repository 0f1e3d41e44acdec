"""What is attacked, how hard at least, and what must come to harm in the control."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Row:
    """One attack.

    Attributes:
        name: as tests are marked with it (``tests/programme.py``).
        figure: how many faults must have been injected by all proofs together.
        faults: what they are, in words.
        control: what the same attack must harm; empty where the attack is a control itself.
        jobs: how many tests at the same time. Those that measure time run alone.
        fewest: how often each outcome must have come up that the tests name.
        every_server: each test on every server; otherwise they take turns.
    """

    name: str
    figure: int
    faults: str
    control: str
    jobs: int = 2
    fewest: int = 0
    every_server: bool = False


ROWS = (
    Row(
        "bad network", 10_000,
        "replies lost, cut in mid-bytes or late, requests lost, in every public mutator",
        "bare RPUSH; scripts without their guard",
    ),
    Row("kills", 1000, "SIGKILLs of workers at work", "separate commands"),
    Row("pauses", 150, "workers stopped past their lease", "the fence not checked", jobs=1),
    Row("claim race", 5000, "sessions that 8 processes claim at once", "read, then set", jobs=1),
    Row("claims and releases", 10_000, "of one session, which leave nothing but its fence",
        "a release that forgets a part"),
    Row("histories", 2000, "histories of claims and appends, linearized", "read, then set", jobs=1),
    Row("model", 100_000, "steps beside a model, a check after each", "", fewest=100),
    Row("mutants", 40, "small damages to the Lua, noticed by the tests", ""),
    Row("cancellations", 200_000, "asyncio calls cancelled in a storm", "replies by index"),
    Row(
        "forks, threads and loops", 15_000,
        "calls from forked processes, threads and event loops", "a single connection, forked",
    ),
    Row("hostile strings", 10_000, "strings made to do harm", "an id that is not checked"),
    Row("terminal escapes", 1000, "lines with escapes shown on a terminal", "raw output"),
    Row("full memory", 300, "crossings of the memory limit", "separate commands"),
    Row("wrong types", 100, "keys of the wrong type before a script", "types not checked"),
    Row("script flush", 10_000, "calls while scripts are flushed and servers restarted",
        "EVALSHA only"),
    Row("server killed", 40, "SIGKILLs of the server under load", "no append-only file"),
    Row("server stopped", 300, "calls to a server that does not answer", "redis-py's default",
        jobs=1),
    Row("doctor", 500, "corrupted keys of every kind, beside workers", "scan, then SREM", jobs=1),
    Row("a million sessions", 50, "public calls, none over 10 ms of the server's time", "SMEMBERS",
        jobs=1),
    Row("slots move", 40, "slots of a cluster moved key by key under workers", "no guard"),
    Row("cluster failover", 10, "primaries of a cluster killed under workers",
        "no replica", jobs=1),
    Row("sentinel failovers", 40,
        "primaries killed, stopped, stopped for a while, or swapped under workers and followers",
        "sentinels asked every 3 s", jobs=1, every_server=True),
    Row("replicas waited for", 30, "failovers that lose nothing a replica has acknowledged",
        "not waited for", jobs=1, every_server=True),
    Row("lost writes", 30, "failovers that lose acknowledged entries, told to who holds the lease",
        "the count not sent", jobs=1, every_server=True),
    Row("clocks", 1000, "grabs by workers whose clocks are 60 s off", "the worker's clock"),
    Row("rolling deploy", 20_000, "operations of two minor versions side by side",
        "a version that refuses what it does not know"),
)  # fmt: skip
