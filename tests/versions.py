"""Other versions of the package, made of the present one: copies with a few changes.

``LATER`` is what a later minor version may do: further hash fields, an index with a name of its
own, a new kind of event, a new field in old ones, all scripts under other digests. ``UNFIT`` are
present versions that would not bear it. A worker process runs one of them through PYTHONPATH.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

#: Where the present version is.
PRESENT = Path(__file__).parents[1]
LATER_VERSION = "0.2.0"


@dataclass(frozen=True, slots=True)
class Change:
    """A text of a file, there once, and what it becomes."""

    file: str
    text: str
    becomes: str


def made(folder: Path, changes: Iterable[Change] = (), *, digests: str = "") -> Path:
    """A version in a folder of its own, to be put on PYTHONPATH.

    Args:
        folder: where; it is created.
        changes: what is different.
        digests: added to each script as a comment, so that all of them have other digests.
    """
    package = folder / "sessionstore"
    # With compiled files, for most modules are as they were; but not those being written just now.
    half_written = shutil.ignore_patterns("*.pyc.*")
    shutil.copytree(PRESENT / "sessionstore", package, ignore=half_written)
    for change in changes:
        file = package / change.file
        text = file.read_text("utf-8")
        found = text.count(change.text)
        assert found == 1, f"{change.file}: {change.text!r} is there {found} times, not once"
        file.write_text(text.replace(change.text, change.becomes), "utf-8")
    for script in package.glob("lua/*.lua") if digests else ():
        script.write_text(f"{script.read_text('utf-8')}\n-- {digests}\n", "utf-8")
    return folder


def after(file: str, text: str, added: str) -> Change:
    """Something added behind a text."""
    return Change(file, text, text + added)


LATER = [
    Change("_version.py", 'version("sessionstore")', f'"{LATER_VERSION}"'),
    # A new hash field, an index by it, and a new kind of event.
    Change(
        "lua/create_session.lua",
        "'created_at', created_at, 'last_activity', created_at, unpack(ARGV, FIRST_FIELD))",
        "'created_at', created_at, 'last_activity', created_at, 'origin', actor,\n"
        "  unpack(ARGV, FIRST_FIELD))\n"
        "redis.call('SADD', prefix .. 'sessions:origin:' .. actor, id)",
    ),
    Change(
        "lua/create_session.lua",
        "event(events, 'created', id, type, actor, 'status', status)",
        "event(events, 'created', id, type, actor, 'status', status, 'origin', actor)\n"
        "event(events, 'origin_noted', id, type, actor, 'origin', actor)",
    ),
    after("lua/include/removal.lua", "    'output_total', 'error_total'", ", 'origin'"),
    after(
        "lua/include/removal.lua",
        "{'type', 'status', 'service', 'task', 'mcp', 'owner'}) do\n"
        "    if stored[i] then\n"
        "      sets[#sets + 1] = prefix .. 'sessions:' .. name .. ':' .. stored[i]\n"
        "    end\n  end",
        "\n  if stored[9] then\n"
        "    sets[#sets + 1] = prefix .. 'sessions:origin:' .. stored[9]\n  end",
    ),
    Change("lua/include/layout.lua", "'mcp', 'owner'}", "'mcp', 'owner', 'origin'}"),
    Change("lua/include/layout.lua", "owner = 'owner'}", "owner = 'owner', origin = 'origin'}"),
    # Hash fields that come later, and a new field of an old event.
    after(
        "lua/include/append.lua",
        "redis.call('HSET', session, 'last_activity', iso(now_us),",
        " 'last_entry_at', iso(now_us),",
    ),
    after(
        "lua/update_status.lua",
        "redis.call('HSET', session, 'status', new,",
        " 'status_since', iso(now_us),",
    ),
    after(
        "lua/update_status.lua",
        "'status_changed', id, type, actor, 'old_status', old, 'status', new",
        ", 'since', iso(now_us)",
    ),
]

_KNOWN = [
    *("id", "type", "status", "service_session_id", "project_path", "task_id", "mcp_session_id"),
    *("created_at", "last_activity", "output_total", "output_bytes", "error_total", "error_bytes"),
    *("owner", "fence", "lease_expires_at", "reap_seen_ms"),
]

UNFIT: dict[str, list[Change]] = {
    "reading refuses fields that it does not know": [
        Change(
            "codec.py",
            '        stored["metadata"] = {',
            f"        if not all(n in {_KNOWN} or n.startswith('meta:') for n in stored):\n"
            "            raise UnreadableSessionError('unknown field')\n"
            '        stored["metadata"] = {',
        )
    ],
    "a change of status writes back only the fields that it knows": [
        Change(
            "lua/update_status.lua",
            "move(prefix, id, old, new)\n",
            "move(prefix, id, old, new)\n"
            "for _, field in ipairs(redis.call('HKEYS', session)) do\n"
            f"  if not string.find(' {' '.join(_KNOWN)} ', ' ' .. field .. ' ', 1, true)\n"
            "    and not string.find(field, '^meta:') then\n"
            "    redis.call('HDEL', session, field)\n"
            "  end\nend\n",
        )
    ],
    "its doctor sets aside indexes that it does not know": [
        Change(
            "lua/include/layout.lua",
            "return split_index(rest) and 'set' or nil",
            "return split_index(rest) and 'set' or 'string'",
        )
    ],
}
