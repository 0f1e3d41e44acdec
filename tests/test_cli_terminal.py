"""The command line on a terminal: what agents write does no harm there, and it is readable.

What is unsafe is written down here once more, from Unicode's own properties where they say it, so
that a hole in ``terminal.py`` is not a hole in its tests.
"""

from __future__ import annotations

import json
import random
import re
import sys
import unicodedata
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from commandline import CommandLine, command_line
from conftest import SERVERS
from faults import seeded
from hypothesis import given, settings
from hypothesis import strategies as st
from programme import Attack, controls, proves
from rich.cells import cell_len

from sessionstore import AgentSession, Reaped, SessionMetrics
from sessionstore._server import PrivateServer
from sessionstore.cli import terminal, views

BIDI_CONTROLS = {
    character
    for character in map(chr, range(sys.maxunicode + 1))
    if unicodedata.bidirectional(character)
    in ("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI")
} | {"\u061c", "\u200e", "\u200f"}
CONTROLS = {chr(code) for code in (*range(0x20), *range(0x7F, 0xA0))}
UNSAFE = CONTROLS | BIDI_CONTROLS | {"\u2028", "\u2029"}
SGR = re.compile(r"\x1b\[[0-9;]*m")  # colours, as rich sends them
ATTACKS = [
    "\x1b[2J\x1b[H",  # clear the screen
    "\x1b]0;title\x07",
    "\x1b]52;c;cm0gLXJmIC8=\x1b\\",  # set the clipboard
    "\x1b]8;;https://evil.example\x1b\\link\x1b]8;;\x1b\\",
    "\x1b[6n\x1bc\x1bP$q\x1b\\",  # make the terminal answer, reset it
    "\x9b31mC1\x9d0;x\x9c",
    "rm -rf /\rls -l   ",  # hide what was written before
    "good\b\b\b\bevil\x7f",
    "admin\u202eflow\u2066x\u2069 \u200f\u061c",
    "[red]markup[/red] [link=https://evil.example]x[/link] :smile:",
    "null\x00byte \x85 \u2028 \u2029 \x0b\x0c",
]

hostile_text = st.lists(
    st.one_of(
        st.sampled_from(sorted(UNSAFE)),
        st.sampled_from(ATTACKS),
        st.text(max_size=5),
        st.text("日本語あé😀\u0301ﷺ", max_size=5),
    ),
    max_size=12,
).map("".join)


def unsafe_in(text: str, allowed: str = "") -> set[str]:
    return {character for character in text if character in UNSAFE} - set(allowed)


# ---- The functions ----------------------------------------------------------------------------


@pytest.mark.parametrize("unsafe", sorted(UNSAFE), ids=lambda c: f"U+{ord(c):04X}")
def test_each_unsafe_character_is_shown_instead_of_sent(unsafe: str) -> None:
    assert re.fullmatch(r"a\\(x[0-9a-f]{2}|u[0-9a-f]{4}|[tnr])b", terminal.one_line(f"a{unsafe}b"))


@given(hostile_text)
def test_no_unsafe_character_survives(text: str) -> None:
    assert not unsafe_in(terminal.one_line(text))
    assert not unsafe_in(terminal.lines(text), allowed="\n\t")
    assert not unsafe_in(terminal.tsv([text, text]), allowed="\t")
    assert not unsafe_in(terminal.to_json([text]))
    assert not unsafe_in("".join(terminal.to_json_list([text])), allowed="\n")


@given(st.text(st.characters(exclude_characters="".join(UNSAFE), exclude_categories=["Cs"])))
def test_all_other_characters_stay_as_they_are(text: str) -> None:
    assert terminal.one_line(text) == terminal.lines(text) == text


@given(st.text(st.characters(categories=["Cs", "L"])))
def test_a_lone_surrogate_does_not_make_printing_fail(text: str) -> None:
    terminal.one_line(text).encode()
    terminal.lines(text).encode()
    terminal.to_json(text).encode()


@given(hostile_text)
def test_json_means_the_same_after_it_was_made_harmless(text: str) -> None:
    assert json.loads(terminal.to_json({"text": text}, indent=2)) == {"text": text}


@given(st.lists(hostile_text, max_size=4))
def test_a_json_list_has_a_value_on_each_line(texts: list[str]) -> None:
    lines = "\n".join(terminal.to_json_list(texts)).split("\n")
    assert json.loads("".join(lines)) == texts
    assert [json.loads(line.rstrip(",")) for line in lines[1:-1]] == texts


@given(st.lists(hostile_text, min_size=1, max_size=5))
def test_a_tsv_row_has_its_fields_and_no_more(texts: list[str]) -> None:
    assert len(terminal.tsv(texts).split("\t")) == len(texts)


def test_only_the_carriage_return_that_ends_a_line_is_left_out() -> None:
    assert terminal.lines("one\r\ntwo\rthree\r") == "one\ntwo\\rthree"


# ---- What the tables make of hostile values ---------------------------------------------------

NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)


@st.composite
def hostile_sessions(draw: st.DrawFn) -> AgentSession:
    """Sessions as somebody could have written them past the library."""
    text = hostile_text
    return AgentSession(
        id=draw(text),
        type=draw(text),
        status=draw(st.sampled_from(["starting", "active", "busy", "error", "terminated"])),
        service_session_id=draw(text),
        project_path=draw(text),
        task_id=draw(st.none() | text),
        mcp_session_id=draw(st.none() | text),
        created_at=NOW - timedelta(seconds=draw(st.integers(-10, 10**7))),
        last_activity=NOW,
        output_buffer=tuple(draw(st.lists(text, max_size=3))),
        error_buffer=tuple(draw(st.lists(text, max_size=3))),
        output_total=draw(st.integers(0, 10**6)),
        error_total=draw(st.integers(0, 3)),
        metadata=draw(st.dictionaries(text, text, max_size=2)),
        owner=draw(st.none() | text),
        lease_expires_at=draw(st.none() | st.just(NOW + timedelta(seconds=9))),
        read_at=NOW,
    )


@settings(max_examples=60, deadline=None)
@given(st.lists(hostile_sessions(), max_size=3), st.integers(1, 250))
def test_tables_hold_nothing_unsafe_and_every_id_whole(
    sessions: list[AgentSession], width: int
) -> None:
    lines = [line.plain for line in views.session_lines(sessions, width)]
    assert not unsafe_in("".join(lines))
    for session in sessions:
        shown = terminal.one_line(session.id).rstrip()
        assert any(line.startswith(shown) for line in lines)


@settings(max_examples=60, deadline=None)
@given(hostile_sessions(), st.integers(20, 250))
def test_details_hold_nothing_unsafe(session: AgentSession, width: int) -> None:
    assert not unsafe_in("".join(line.plain for line in views.detail_lines(session, width)))


@settings(max_examples=60, deadline=None)
@given(hostile_text, hostile_text, st.integers(1, 250))
def test_what_was_reaped_is_told_with_nothing_unsafe(session: str, reason: str, width: int) -> None:
    reaped = [Reaped(session_id=session, action="lost", reason=reason, status="busy", owner="x")]
    lines = views.reaped_lines(reaped, width, header=True, dry_run=False)
    assert not unsafe_in("".join(line.plain for line in lines))


def session_like(number: int, **changes: Any) -> AgentSession:
    values: dict[str, Any] = {
        "id": f"agent_claude_00000000-0000-4000-8000-{number:012}",
        "type": "claude",
        "status": "terminated",
        "service_session_id": f"service-session-with-a-long-name-{number}",
        "project_path": "/srv/projects/with/a/long/path/to/it",
        "task_id": f"task-{number}",
        "created_at": NOW - timedelta(hours=3),
        "last_activity": NOW - timedelta(seconds=90),
        "output_buffer": ("the last line 日本語 " * 30,),
        "output_total": 1204,
        "read_at": NOW,
    }
    return AgentSession(**(values | changes))


@pytest.mark.parametrize("width", [80, 100, 120, 160, 200, 400])
def test_no_line_of_a_table_is_wider_than_the_terminal(width: int) -> None:
    lines = list(views.session_lines([session_like(1), session_like(2)], width))
    assert max(cell_len(line.plain) for line in lines) <= width


@pytest.mark.parametrize("width", [80, 120, 200])
def test_the_last_output_is_seen_at_every_width(width: int) -> None:
    lines = [line.plain for line in views.session_lines([session_like(1)], width)]
    assert any("the last line" in line for line in lines)


def test_the_last_output_is_the_last_line_with_something_on_it() -> None:
    session = session_like(1, output_buffer=("one\n  two\tthree  \n\n",))
    lines = [line.plain for line in views.session_lines([session], 400)]
    assert lines[1].endswith("two three")


HELD = {
    "status": "busy",
    "owner": "build-machine-7:41234:worker-3",
    "lease_expires_at": NOW + timedelta(seconds=24),
}


@pytest.mark.parametrize("width", [80, 100, 120, 160, 200, 400])
def test_how_long_a_session_is_held_is_seen_at_every_width(width: int) -> None:
    sessions = [session_like(1, **HELD), session_like(2)]
    lines = [line.plain for line in views.session_lines(sessions, width)]
    assert max(map(cell_len, lines)) <= width
    assert "24s" in "\n".join(lines)


@pytest.mark.parametrize("width", [80, 100, 160, 400])
def test_who_holds_a_session_is_seen_beside_or_below(width: int) -> None:
    lines = [line.plain for line in views.session_lines([session_like(1, **HELD)], width)]
    assert "41234:worker-3" in "\n".join(lines)


def test_a_wide_table_has_columns_for_owner_and_lease() -> None:
    header, first, second = views.session_lines([session_like(1, **HELD), session_like(2)], 200)
    owner, lease = (header.plain.index(name) for name in ("OWNER", "LEASE"))
    assert first.plain[owner:].startswith("…achine-7:41234:worker-3")
    assert first.plain[: lease + 5].endswith("24s")
    assert not second.plain[owner : lease + 5].strip()


def test_a_table_of_sessions_that_nobody_holds_has_no_such_columns() -> None:
    header = next(iter(views.session_lines([session_like(1)], 400)))
    assert "OWNER" not in header.plain
    assert "LEASE" not in header.plain


def test_an_expired_lease_is_told_as_such() -> None:
    past = HELD | {"lease_expires_at": NOW - timedelta(seconds=12)}
    for width in (80, 400):
        lines = views.session_lines([session_like(1, **past)], width)
        assert "expired" in "\n".join(line.plain for line in lines)
    details = [line.plain for line in views.detail_lines(session_like(1, **past), 80)]
    assert "  owner     build-machine-7:41234:worker-3, lease expired 12s ago" in details
    details = [line.plain for line in views.detail_lines(session_like(1, **HELD), 80)]
    assert "  owner     build-machine-7:41234:worker-3, lease ends in 24s" in details


def reaped_at(width: int) -> list[str]:
    reaped = [
        Reaped(
            session_id=f"agent_claude_00000000-0000-4000-8000-{number:012}",
            action="lost",
            reason="the lease of host:1 expired at noon and was not renewed",
            status="busy",
            owner="host:1",
        )
        for number in range(2)
    ]
    return [line.plain for line in views.reaped_lines(reaped, width, header=True, dry_run=False)]


def test_why_a_session_was_reaped_stands_beside_it_or_below() -> None:
    header, *wide = reaped_at(160)
    assert header.split() == ["ACTION", "ID", "STATUS", "REASON"]
    assert [line.split()[0] for line in wide] == ["lost", "lost"]
    assert all(line.index("the lease of") == header.index("REASON") for line in wide)
    assert max(map(cell_len, [header, *wide])) <= 160
    header, *narrow = reaped_at(80)
    assert header.split() == ["ACTION", "ID", "STATUS"]
    assert narrow[1::2] == ["  the lease of host:1 expired at noon and was not renewed"] * 2


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(-1, "0s"), (0.9, "0s"), (59.9, "59s"), (60, "1m"), (7199, "1h"), (86400 * 400, "400d")],
)
def test_durations_are_short(seconds: float, shown: str) -> None:
    assert views.duration(seconds) == shown


def test_metrics_of_an_empty_store_can_be_shown() -> None:
    empty = SessionMetrics(
        total_sessions=0,
        active_sessions=0,
        busy_sessions=0,
        error_sessions=0,
        sessions_by_type={},
        sessions_by_status={"active": 0},
    )
    assert next(iter(views.metrics_lines(empty))).plain == "0 sessions"


# ---- The real command line on a pseudo-terminal -----------------------------------------------


@pytest.fixture
def cli(running: Callable[[str], PrivateServer]) -> Iterator[CommandLine]:
    with command_line(running(SERVERS[0])) as opened:
        yield opened


def infested(cli: CommandLine) -> AgentSession:
    """A session with an attack in every place that a user of Redis can write to."""
    attack = "".join(ATTACKS)
    session = cli.store.create_session(
        "claude",
        "service\u202eecivres\u2066",
        "/src\u200f/[bold]x[/bold]",
        task_id="task-\u202e1[red]",
        metadata={"note": attack},
    )
    cli.store.add_output(session.id, *ATTACKS, attack)
    cli.store.add_error(session.id, *ATTACKS, attack)
    key = f"{{{cli.namespace}}}:session:{session.id}"
    cli.redis.hset(
        key,
        mapping={"project_path": attack, "mcp_session_id": attack, "owner": attack}
        | {"lease_expires_at": "2026-01-01T00:00:00.000000+00:00", f"meta:{attack}": attack},
    )
    cli.redis.zadd(f"{{{cli.namespace}}}:leases", {session.id: 1})
    return session


COMMANDS = [
    ["ls"],
    ["ls", "--json"],
    ["show", "ID"],
    ["show", "ID", "--json"],
    ["logs", "ID"],
    ["logs", "ID", "--errors"],
    ["logs", "ID", "--json"],
    ["metrics"],
    ["reap", "--dry-run"],
    ["reap", "--dry-run", "--json"],
    ["events", "--json"],
    ["doctor", "--json"],
    ["show", "no\u202esuch"],
    ["ls", "--type", "\x1b[2J"],
    ["\x1b[2J"],
    ["ls", "--\x1b[2J"],
    ["rm", "no\u202esuch", "ID"],
]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: " ".join(map(ascii, command)))
def test_nothing_unsafe_reaches_the_terminal(cli: CommandLine, command: list[str]) -> None:
    session = infested(cli)
    arguments = [session.id if word == "ID" else word for word in command]
    finished = cli.on_terminal(*arguments, env={"NO_COLOR": "1"})
    assert len(finished.out) > 20
    assert not unsafe_in(finished.out, allowed="\n\t")
    assert "Traceback" not in finished.out


@pytest.mark.parametrize("command", ["ls", "show", "metrics"])
def test_with_colours_only_colours_are_sent(cli: CommandLine, command: str) -> None:
    session = infested(cli)
    arguments = [session.id] if command == "show" else []
    out = cli.on_terminal(command, *arguments).out
    assert SGR.search(out)
    assert not unsafe_in(SGR.sub("", out), allowed="\n")


def hostile_texts(rng: random.Random, count: int) -> list[str]:
    """So many, each with something unsafe; each unsafe character is in one of them at least."""
    unsafe = [*ATTACKS, *sorted(UNSAFE)]
    texts = [
        "".join(rng.choices([*unsafe, "日本", "plain", "\\"], k=rng.randrange(1, 12)))
        for _ in range(count)
    ]
    return [text + unsafe[number % len(unsafe)] for number, text in enumerate(texts)]


def harm(out: str) -> int:
    """How many unsafe characters a terminal received."""
    return sum(character in UNSAFE for character in out) - sum(map(out.count, "\n\t"))


LOGS = [["logs"], ["logs", "--json"], ["logs", "--follow"], ["show", "--tail", "1000"]]


@pytest.mark.parametrize("command", LOGS, ids=" ".join)
@proves("terminal escapes", ordinary=200, full=1_000)
def test_hostile_lines_do_no_harm(cli: CommandLine, command: list[str], attack: Attack) -> None:
    session = cli.store.create_session("claude", "service-1", "/src")
    cli.store.add_output(session.id, *hostile_texts(seeded(), attack.size))
    cli.store.update_status(session.id, "terminated")

    out = cli.on_terminal(*command, session.id, env={"NO_COLOR": "1"}).out

    lines = out.count("\n")
    assert lines >= attack.size
    attack.tell(injected=attack.size, wrong=harm(out), lines_received=lines)


FIELDS = ("project_path", "mcp_session_id", "task_id", "owner", "meta:note")
LISTINGS = [
    ["ls"],
    ["ls", "--json"],
    ["reap", "--dry-run"],
    ["events", "--tail", "10000"],
    ["doctor"],
    ["export"],
]


@pytest.mark.parametrize("command", LISTINGS, ids=" ".join)
@proves("terminal escapes", ordinary=200, full=1_000)
def test_hostile_fields_do_no_harm(cli: CommandLine, command: list[str], attack: Attack) -> None:
    """Written past the library, by anybody who can write to the server."""
    rest = iter(hostile_texts(seeded(), attack.size))
    prefix = f"{{{cli.namespace}}}:"
    for number in range(attack.size // len(FIELDS)):
        session = cli.store.create_session("claude", f"service-{number}", "/src")
        fields = {name: next(rest) for name in FIELDS}
        owner = fields["owner"]
        fields |= {"status": "busy", "lease_expires_at": "2026-01-01T00:00:00.000000Z"}
        cli.redis.hset(f"{prefix}session:{session.id}", mapping=fields)
        cli.redis.zadd(f"{prefix}leases", {session.id: 1})
        cli.redis.xadd(f"{prefix}events", {"event": "created", "session_id": owner, "actor": owner})

    out = cli.on_terminal(*command, env={"NO_COLOR": "1"}).out

    assert "Traceback" not in out
    lines = out.count("\n")
    assert lines >= attack.size // len(FIELDS)
    attack.tell(injected=attack.size, wrong=harm(out), lines_received=lines)


@controls("terminal escapes", ordinary=200, full=1_000)
def test_raw_lines_reach_the_terminal_as_they_are(cli: CommandLine, attack: Attack) -> None:
    session = cli.store.create_session("claude", "service-1", "/src")
    cli.store.add_output(session.id, *hostile_texts(seeded(), attack.size))

    raw = cli.on_terminal("logs", session.id, "--raw").out

    assert unsafe_in(raw) >= UNSAFE  # all of them were there
    attack.tell(injected=attack.size, wrong=harm(raw))


def test_markup_of_agents_is_shown_literally(cli: CommandLine) -> None:
    session = cli.store.create_session("claude", "service-1", "/src")
    cli.store.add_output(session.id, "[bold red]hi[/bold red] :smile:")
    for command in (["ls"], ["show", session.id], ["logs", session.id]):
        assert "[bold red]hi[/bold red] :smile:" in cli.on_terminal(*command, columns=200).out


def test_a_hostile_warning_does_no_harm(cli: CommandLine) -> None:
    session = cli.store.create_session("claude", "service-1", "/src")
    key = f"{{{cli.namespace}}}:session:{session.id}"
    cli.redis.hset(key, mapping={"id": "\x1b[2J\u202e", "created_at": "\x1b[2J"})
    out = cli.on_terminal("ls", env={"NO_COLOR": "1"}).out
    assert "left out of a listing" in out
    assert not unsafe_in(out, allowed="\n")


# ---- How it looks there -----------------------------------------------------------------------


@pytest.mark.parametrize("columns", [20, 160])
def test_ls_shows_ids_whole_at_every_width(cli: CommandLine, columns: int) -> None:
    sessions = [cli.store.create_session("opencode", "s" * 60, "/p" * 60) for _ in range(3)]
    out = cli.on_terminal("ls", columns=columns).out
    assert all(session.id in out for session in sessions)
    assert "STATUS" in out


@pytest.mark.parametrize("env", [{"NO_COLOR": "1"}, {"TERM": "dumb"}], ids=["NO_COLOR", "dumb"])
def test_no_escape_is_sent_where_no_colour_is_wanted(
    cli: CommandLine, env: dict[str, str | None]
) -> None:
    session = cli.store.create_session("claude", "service-1", "/src", status="error")
    out = cli.on_terminal("ls", env=env).out
    assert session.id in out
    assert "\x1b" not in out


def test_colours_do_not_follow_into_a_pipe(cli: CommandLine) -> None:
    cli.store.create_session("claude", "service-1", "/src", status="error")
    assert "\x1b" not in cli.run("ls", env={"FORCE_COLOR": "1"}).out


def test_ls_of_an_empty_store_says_so(cli: CommandLine) -> None:
    assert cli.on_terminal("ls", env={"NO_COLOR": "1"}).out == "no sessions\n"


def test_rm_says_what_it_deleted(cli: CommandLine) -> None:
    session = cli.store.create_session("claude", "service-1", "/src")
    finished = cli.on_terminal("rm", session.id)
    assert (finished.code, finished.out) == (0, f"deleted {session.id}\n")


def test_nothing_to_reap_is_said(cli: CommandLine) -> None:
    finished = cli.on_terminal("reap")
    assert (finished.code, finished.out) == (0, "nothing to reap\n")


def test_a_dry_run_says_what_would_be(cli: CommandLine) -> None:
    session = cli.store.create_session("claude", "service-1", "/src")
    out = cli.on_terminal("reap", "--dry-run", "--idle-for", "0", env={"NO_COLOR": "1"}).out
    header, *lines = out.splitlines()
    assert header.startswith("WOULD BE")
    assert lines[0].split()[:3] == ["terminated", session.id, "active"]
    assert cli.store.get_session(session.id).status == "active"
