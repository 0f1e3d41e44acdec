"""Did the store keep what the commands said? Checked without the store.

On one side the files that the workers wrote beside the store, byte for byte what the commands
wrote; on the other Redis itself, read with plain redis-py and the key names of the README.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from redis import Redis

from sessionstore.cli.demo.accident import Accident
from sessionstore.cli.demo.worker import KEPT_LINES, raw_output

LONGEST_ENTRY = 64 * 1024


@dataclass
class Findings:
    """What was compared, and what was wrong."""

    lines: int = 0
    buffers: int = 0
    indexes: int = 0
    problems: list[str] = field(default_factory=list[str])

    def expect(self, what: str, found: object, wanted: object) -> None:
        if found != wanted:
            self.problems.append(f"{what}: found {found!r:.200}, wanted {wanted!r:.200}")


def plain_client(url: str) -> Any:
    """A redis-py client that has nothing of the store; untyped, as redis-py's replies are."""
    redis: Any = Redis
    return redis.from_url(url, decode_responses=True, protocol=2)


def verify(
    url: str,
    namespace: str,
    directory: Path,
    codes: dict[str, int],
    accident: Accident | None = None,
) -> Findings:
    """Compare everything; ``codes`` has the exit code of each session's command."""
    findings = Findings()
    interrupted = accident.session_id if accident else ""
    with plain_client(url) as client:
        prefix = f"{{{namespace}}}:"
        hashes = {id: client.hgetall(f"{prefix}session:{id}") for id in codes}
        for session_id, code in codes.items():
            fields = hashes[session_id]
            wanted = "terminated" if code == 0 else "error"
            findings.expect(f"{session_id} status", fields.get("status"), wanted)
            findings.expect(f"{session_id} exit code", fields.get("meta:exit_code"), str(code))
            for descriptor, buffer, total in ((1, "output", "output"), (2, "errors", "error")):
                what = f"{session_id} {buffer}"
                entries = client.lrange(f"{prefix}session:{session_id}:{buffer}", 0, -1)
                lines = _lines(raw_output(directory, session_id, descriptor))
                if accident and session_id == interrupted:
                    again = _lines(raw_output(directory, session_id, descriptor, again=True))
                    _check_interrupted(findings, what, entries, lines, again, accident, descriptor)
                    continue
                _check_buffer(findings, what, entries, int(fields.get(f"{total}_total", 0)), lines)
        _check_indexes(findings, client, prefix, hashes)
    return findings


def _lines(file: Path) -> list[bytes]:
    lines = file.read_bytes().split(b"\n") if file.exists() else [b""]
    if lines[-1] == b"":
        lines.pop()
    return lines


def _check_interrupted(
    findings: Findings,
    what: str,
    entries: Sequence[str],
    lines: Sequence[bytes],
    again: Sequence[bytes],
    accident: Accident,
    descriptor: int,
) -> None:
    """What the killed worker had stored, what the reaper said of it, and all of the second try.

    Nothing that was surely stored when the worker was killed may be missing; of what its command
    wrote after that, some may.
    """
    said = 1 if descriptor == 2 else 0
    first_try = len(entries) - said - len(again)
    findings.buffers += 1
    findings.lines += len(entries)
    stored = accident.kept[descriptor - 1]
    if not stored <= first_try <= len(lines):
        findings.problems.append(
            f"{what}: {first_try} entries of the killed worker, {stored} to {len(lines)} wanted"
        )
        return
    decoded = [line.decode(errors="replace") for line in [*lines[:first_try], *again]]
    findings.expect(what, [*entries[:first_try], *entries[first_try + said :]], decoded)
    if said and accident.lost_owner not in entries[first_try]:
        findings.problems.append(f"{what}: {entries[first_try]!r} does not name the lost worker")


def _check_buffer(
    findings: Findings, what: str, entries: list[str], total: int, lines: list[bytes]
) -> None:
    """Every line in the list, in order, once; of a trimmed list, the newest ones."""
    wanted = [piece for line in lines for piece in _pieces(line)]
    findings.buffers += 1
    findings.lines += len(lines)
    findings.expect(f"{what}, entries ever added", total, len(wanted))
    findings.expect(f"{what}, entries kept", len(entries), min(len(wanted), KEPT_LINES))
    findings.expect(what, entries, wanted[len(wanted) - len(entries) :])


def _pieces(line: bytes) -> list[str]:
    """A line as entries of 64 KiB at most, cut where a character begins."""
    pieces: list[str] = []
    while len(line) > LONGEST_ENTRY:
        end = next(n for n in range(LONGEST_ENTRY, 0, -1) if line[n] & 0xC0 != 0x80)
        end = end if end > LONGEST_ENTRY - 4 else LONGEST_ENTRY - 3  # no UTF-8 at all
        pieces.append(line[:end].decode(errors="replace"))
        line = line[end:]
    return [*pieces, line.decode(errors="replace")]


def _check_indexes(
    findings: Findings, client: Any, prefix: str, hashes: dict[str, dict[str, str]]
) -> None:
    """Each index set holds exactly the sessions whose hash says so."""
    wanted: dict[str, set[str]] = defaultdict(set)
    fields = {
        "type": "type",
        "status": "status",
        "service": "service_session_id",
        "task": "task_id",
        "mcp": "mcp_session_id",
    }
    for session_id, stored in hashes.items():
        for index, name in fields.items():
            if name in stored:
                wanted[f"{prefix}sessions:{index}:{stored[name]}"].add(session_id)
    for key in _scan(client, f"{prefix}sessions:*"):
        wanted.setdefault(key, set())  # an index set that should not be there
    for key, ids in wanted.items():
        findings.indexes += 1
        findings.expect(key, client.smembers(key), ids)
        findings.expect(f"{key}, cardinality", client.scard(key), len(ids))
    findings.expect("all sessions", set(client.zrange(f"{prefix}sessions", 0, -1)), set(hashes))
    ended = {id for id, stored in hashes.items() if stored.get("status") in ("error", "terminated")}
    findings.expect("ended", set(client.zrange(f"{prefix}ended", 0, -1)), ended)
    findings.expect("leases", client.zcard(f"{prefix}leases"), 0)
    findings.expect("activity", client.zcard(f"{prefix}activity"), len(hashes) - len(ended))


def _scan(client: Any, pattern: str) -> Iterable[str]:
    for key in client.scan_iter(pattern, count=1000):
        yield str(key)
