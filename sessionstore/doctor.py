"""The doctor: what disagrees between sessions and indexes, and mending it while workers write.

A session's hash is the truth, and indexes follow from it. Two walks over the namespace with SCAN
only look for candidates: the first for the sessions' hashes, the second for all other keys and, in
them, for members that no session accounts for. So what indexes lack is added before anything is
taken from them. Every decision is made in a script, from the session as it is at that moment
(``lua/include/examine.lua``); ``lua/repair_session.lua`` decides and mends in one step. A healthy
store under traffic therefore has no problems: a naive repair, which scans and then removes, tore a
session apart in ten minutes of it.

Nothing is destroyed: what no session accounts for is renamed to ``…:quarantine:…``.

This module decides nothing about sessions. It walks, in pages of bounded size, and says in words
what the scripts have found.
"""

from __future__ import annotations

import json
import re
from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeVar, cast
from urllib.parse import quote_from_bytes, unquote_to_bytes

from sessionstore import codec, opening
from sessionstore._call import Call, Feed, Page, Request, Several, stepwise
from sessionstore.keys import Keys, Keyspace
from sessionstore.models import STATUSES, Drift, Problem, ProblemKind
from sessionstore.settings import StoreSettings

T = TypeVar("T")

KEYS_A_PAGE = 250  # about 2 ms of the server's time, as each of the following
SESSIONS_A_SCRIPT = 16
MEMBERS_A_SCRIPT = 250
SCRIPTS_A_ROUND_TRIP = 16
WEIGHED_ENTRIES, WEIGHED_BYTES = 2000, 256 * 1024  # of buffers, in one script
MOST_PIECES = 1000  # of one buffer, before it is left to the next run
#: A lease that has expired so many grace periods ago has seen two passes of any reaper.
OVERDUE = 6.0

_SECTIONS = ("server", "memory", "persistence", "cluster")
_OLDEST = (6, 2)


@dataclass(frozen=True, slots=True)
class _Words:
    """How a kind of problem is told. ``{key}`` is the key, ``{detail}`` what the script adds."""

    message: str
    mending: str
    mendable: bool = True
    warning: bool = False


_WORDS: dict[ProblemKind, _Words] = {
    "index_missing": _Words("{detail} is not in this index", "add it"),
    "index_score": _Words("{detail} has another score here than in its hash", "set the score"),
    "index_stray": _Words("{detail} is in this index, and its hash says otherwise", "remove it"),
    "index_orphan": _Words("{detail} is in this index, and there is no such session", "remove it"),
    "buffer_orphan": _Words("a buffer without a session", "set it aside under quarantine"),
    "buffer_total": _Words(
        "the total of entries ever added is {detail}, less than there are, or no number",
        "set it to the number of entries",
    ),
    "buffer_bytes": _Words(
        "the bytes that its hash says, {detail}, are not those of its entries",
        "set them to what the entries weigh",
    ),
    "buffer_over_bound": _Words(
        "it holds more than this store's settings allow: {detail} entries",
        "the next appends trim it",
        mendable=False,
        warning=True,
    ),
    "field_restored": _Words(
        "the field {detail} is missing or cannot be right", "set it to the one value that fits"
    ),
    "field_unreadable": _Words(
        "the field {detail} is missing or cannot be read, and no index tells what it was",
        "nothing: set it by hand",
        mendable=False,
    ),
    "lease_torn": _Words(
        "the field {detail} does not fit the rest of its lease",
        "make status, owner, fence and expiry agree",
    ),
    "lease_overdue": _Words(
        "the lease of {detail} expired long ago, and nobody has reaped it",
        "nothing: run a Reaper, or sessionstore reap",
        mendable=False,
        warning=True,
    ),
    "wrong_type": _Words(
        "a key of the wrong type: {detail}",
        "set it aside under quarantine; an index is rebuilt, a session's entries are removed",
    ),
    "expiry": _Words("it expires by itself", "take the expiry away"),
    "lane_lasting": _Words("a lane that never expires", "let it expire"),
    "wrong_partition": _Words(
        "it is in another partition than {detail} tells, where look-ups do not find it",
        "nothing: its namespace was made with other settings, or it was moved by hand",
        mendable=False,
    ),
    "unknown_key": _Words(
        "a key that this version of the store does not know",
        "nothing: it may be a later version's, or somebody's",
        mendable=False,
        warning=True,
    ),
    "layout": _Words(
        "{detail}", "nothing: no key of another layout is touched", mendable=False
    ),
    "layout_missing": _Words(
        "the layout of the namespace is not there: {detail}", "write this store's"
    ),
    "drift": _Words(
        "the counts of all sessions differ: {detail}",
        "nothing: it follows from the other problems",
        mendable=False,
    ),
    "server": _Words("{detail}", "nothing: change the server's settings", mendable=False),
}  # fmt: skip

#: Of a session though its key is an index.
_ABOUT_A_MEMBER = ("index_missing", "index_score", "index_stray", "index_orphan")

#: Names as they travel: plain ASCII with %XX.
Plain = str


def _shown(name: Plain) -> str:
    return unquote_to_bytes(name).decode(errors="backslashreplace")


def _plain(name: str) -> Plain:
    return quote_from_bytes(name.encode(), safe="!\"#$&'()*+,-./:;<=>?@[\\]^_`{|}~")


def drift_of(keyspace: Keyspace) -> Request[Drift]:
    """Count all sessions in three ways, over all partitions."""

    def added(replies: Sequence[Sequence[Any]]) -> Drift:
        sums = [sum(map(int, column)) for column in zip(*replies, strict=True)]
        return Drift(sessions=sums[0], by_status=sums[1], by_type=sums[2], by_time=sums[3])

    calls = [
        Call(
            "drift",
            keys=(keys.sessions, keys.types, keys.activity, keys.ended),
            args=(keys.prefix, *STATUSES),
            decode=lambda reply: added([reply]),
            unopened=True,
        )
        for keys in keyspace.all
    ]
    return calls[0] if len(calls) == 1 else Several(calls, added)


@dataclass(frozen=True, slots=True)
class Place:
    """How far the doctor has come.

    ``walk``: first the server, then the sessions, then all keys, at last the sums. ``targets``:
    the patterns still to be scanned; ``large``: indexes whose members are still to be walked, as
    prefix and key, and where in the first of them.
    """

    walk: Literal["server", "sessions", "keys", "sums"] = "server"
    targets: tuple[tuple[str, str], ...] = ()
    scan: str = "0"
    large: tuple[tuple[Plain, Plain], ...] = ()
    member: str = "0"


Steps = Generator[Request[Any], Any, Page[Problem, Place]]


@dataclass(slots=True)
class Doctor:
    """One run over a namespace.

    Args:
        keyspace: the namespace.
        settings: the store's: bounds of buffers, grace period, layout.
        repairs: mend what is found.
    """

    keyspace: Keyspace
    settings: StoreSettings
    repairs: bool
    _partitions: dict[Plain, Keys] = field(init=False)
    #: Keys of the wrong type that were told: each session that needs one finds it again, and when
    #: one has been set aside each session is missing in the one that takes its place.
    _spoilt: set[str] = field(init=False, default_factory=set[str])
    #: Sets of types that sessions are missing in: where they are lost, the type is not.
    _lacking: set[str] = field(init=False, default_factory=set[str])
    _keys_seen: bool = False
    _foreign_seen: bool = False
    _layout_missing: str = ""

    def __post_init__(self) -> None:
        self._partitions = {_plain(keys.prefix): keys for keys in self.keyspace.all}

    @property
    def _beside(self) -> Keys:
        """The prefix of the layout's key, which is in no partition."""
        return Keys(self.settings.namespace)

    def feed(self) -> Feed[Problem, Place]:
        """The problems, page by page."""
        return Feed(Place(), self._page)

    def _page(self, place: Place) -> Request[Page[Problem, Place]]:
        match place.walk:
            case "server":
                return stepwise(self._server(), self._begin)
            case _ if place.large:  # of the last page of keys too, before the sums
                return stepwise(self._members(place), lambda r: self._walk_members(place, r))
            case "sums":
                return stepwise(drift_of(self.keyspace), self._end)
            case _:
                return stepwise(self._scan(place), lambda reply: self._walk_keys(place, reply))

    # ---- The server and the layout --------------------------------------------------------

    def _server(self) -> Call[Any]:
        return Call("check_server", (self.keyspace.meta,), _SECTIONS, lambda r: r, unopened=True)

    def _begin(self, reply: Any) -> Steps:
        """Look at the layout and at the server; a namespace of another layout ends the run."""
        kind, meta, sections = codec.text(reply[0]), reply[1], reply[2]
        info = dict(
            re.findall(
                r"^(\w+):(.*?)\r?$",
                "\n".join(_shown(codec.text(s)) for s in sections),
                re.MULTILINE,
            )
        )
        problems = list(self._of_server(info))
        values = [_shown(codec.text(part)) for part in meta]
        found = dict(zip(values[::2], values[1::2], strict=True))
        refused = opening.other_layout(found, self.settings)
        if kind == "none":
            self._layout_missing = "no such key"
        elif kind != "hash":
            self._layout_missing = f"a {kind} is in its place"
        elif refused:
            problems.append(self._told("layout", self.keyspace.meta, refused))
            return Page(problems, None)
        place = Place("sessions", self._targets(cluster=info.get("cluster_enabled") == "1"))
        return Page(problems, place)
        yield  # a generator like the others, though it asks for nothing

    def _of_server(self, info: dict[str, str]) -> Iterable[Problem]:
        def about(text: str, *, warning: bool = True) -> Problem:
            return self._told("server", self.keyspace.meta, text).model_copy(
                update={"warning": warning}
            )

        if not info:
            yield about("INFO is denied or not there: the server's settings are not known")
            return
        policy = info.get("maxmemory_policy", "")
        if int(info.get("maxmemory", "0")):
            if policy.startswith("allkeys-"):
                yield about(
                    f"it evicts any key when its memory is full (maxmemory-policy {policy})",
                    warning=self.settings.allow_eviction,
                )
            elif policy.startswith("volatile-"):
                yield about(f"it may evict what protects writes (maxmemory-policy {policy})")
        if info.get("aof_enabled") == "0":
            yield about("it has no append-only file: what a crash takes depends on its snapshots")
        version = info.get("valkey_version") or info.get("redis_version", "")
        numbers = tuple(int(part) for part in version.split(".")[:2] if part.isdecimal())
        if numbers and numbers < _OLDEST:
            yield about(f"its version is {version}, older than 6.2", warning=False)

    def _targets(self, *, cluster: bool) -> tuple[tuple[str, str], ...]:
        """What to scan: a key that says which server, and a pattern.

        A single server is scanned once for all partitions. In a cluster each partition is scanned
        where it is.
        """
        namespace = _escaped(self.settings.namespace)
        if not cluster or len(self.keyspace.all) == 1:
            return ((self.keyspace.meta, f"{{{namespace}[/}}]*"),)
        own = (self.keyspace.meta, f"{{{namespace}}}:*")
        return (own, *((keys.sessions, f"{_escaped(keys.prefix)}*") for keys in self.keyspace.all))

    # ---- Walking --------------------------------------------------------------------------

    def _scan(self, place: Place) -> Call[Any]:
        (key, pattern), only_sessions = place.targets[0], place.walk == "sessions"
        return Call(
            "check_keys",
            keys=(key,),
            args=(
                place.scan,
                f"{pattern}session:*" if only_sessions else pattern,
                KEYS_A_PAGE,
                "1" if only_sessions else "",
            ),
            decode=lambda reply: reply,
            unopened=True,
        )

    def _walk_keys(self, place: Place, reply: Any) -> Steps:
        cursor = codec.text(reply[0])
        keys = [tuple(map(codec.text, told)) for told in reply[1]]
        self._keys_seen = self._keys_seen or bool(keys)
        following = replace(place, scan=cursor)
        if cursor == "0":
            following = self._after_target(place)
        if place.walk == "sessions":
            return Page((yield from self._walk_sessions(keys)), following)
        problems: list[Problem] = []
        indexes: dict[Plain, list[Plain]] = {}
        for prefix, rest, kind, wrong in keys:
            is_ours = prefix in self._partitions or _shown(prefix) == self._beside.prefix
            if wrong == "unknown_key" and is_ours:
                problems.append(self._finding(prefix, "unknown_key", rest, kind))
            elif prefix not in self._partitions and not self._is_layout(prefix, rest):
                problems += self._elsewhere(prefix, rest)
            elif wrong:
                problems += yield from self._wrong_key(prefix, rest, kind, wrong)
            if prefix in self._partitions and wrong in ("", "expiry") and kind != "hash":
                indexes.setdefault(prefix, []).append(rest)
        large: list[tuple[Plain, Plain]] = []
        seen = yield from self._doubtful(indexes, large)
        problems += yield from self._examine(seen, whole=False)
        return Page(problems, replace(following, large=(*following.large, *large)))

    def _after_target(self, place: Place) -> Place:
        (key, _), *others = place.targets
        if others:
            return replace(place, targets=tuple(others), scan="0")
        if place.walk == "sessions":
            cluster = key != self.keyspace.meta
            return replace(place, walk="keys", targets=self._targets(cluster=cluster), scan="0")
        return replace(place, walk="sums", targets=(), scan="0")

    def _walk_sessions(
        self, keys: Sequence[tuple[Plain, ...]]
    ) -> Generator[Request[Any], Any, list[Problem]]:
        problems: list[Problem] = []
        here: dict[tuple[Plain, Plain], list[Plain]] = {}
        for prefix, rest, *_ in keys:
            session_id = rest.removeprefix("session:")
            if prefix not in self._partitions:
                problems += self._elsewhere(prefix, rest)
                continue
            if self.keyspace.of_session(_shown(session_id)).prefix != _shown(prefix):
                problems.append(self._finding(prefix, "wrong_partition", rest, "its%20id"))
            here[prefix, session_id] = []
        problems += yield from self._examine(here, whole=True)
        return problems

    def _is_layout(self, prefix: Plain, rest: Plain) -> bool:
        return _shown(prefix + rest) == self.keyspace.meta

    def _elsewhere(self, prefix: Plain, rest: Plain) -> Iterable[Problem]:
        """A key of another layout."""
        if not rest.startswith("quarantine:"):
            self._foreign_seen = True
            yield self._finding(prefix, "wrong_partition", rest, "the%20layout")

    def _wrong_key(
        self, prefix: Plain, rest: Plain, kind: str, wrong: str
    ) -> Generator[Request[Any], Any, list[Problem]]:
        if wrong == "wrong_type" and self._is_layout(prefix, rest):
            return []  # at the end
        if not self.repairs:
            return self._findings(prefix, [(wrong, rest, kind)])
        own = re.fullmatch(r"session:([^:]+)", rest)
        if own is not None and wrong == "wrong_type":
            return (yield from self._repair(prefix, own[1], [], whole=False))
        found = yield self._repair_key(prefix, rest)
        return self._findings(prefix, found, repaired=True)

    def _repair_key(self, prefix: Plain, rest: Plain, member: Plain = "") -> Call[Any]:
        keys = self._partitions.get(prefix) or self._beside
        return Call(
            "repair_key",
            keys=(keys.sessions,),
            args=(keys.prefix, rest, member),
            decode=_told_as_json,
            lane=keys.lane,
            unopened=True,
        )

    # ---- Indexes --------------------------------------------------------------------------

    def _doubtful(
        self, indexes: dict[Plain, list[Plain]], large: list[tuple[Plain, Plain]]
    ) -> Generator[Request[Any], Any, dict[tuple[Plain, Plain], list[Plain]]]:
        """Members that may not belong in the indexes: by prefix and id, the keys without prefix."""
        seen: dict[tuple[Plain, Plain], list[Plain]] = {}
        waiting = [(prefix, rests) for prefix, rests in indexes.items() if rests]
        while waiting:
            asked, waiting = waiting[:SCRIPTS_A_ROUND_TRIP], waiting[SCRIPTS_A_ROUND_TRIP:]
            replies = yield Several(
                [self._index_call(prefix, rests) for prefix, rests in asked], lambda r: r
            )
            for (prefix, rests), (looked_at, too_large, told) in zip(asked, replies, strict=True):
                large += [(prefix, codec.text(rest)) for rest in too_large]
                for rest, *ids in told:
                    for session_id in ids:
                        seen.setdefault((prefix, codec.text(session_id)), []).append(
                            codec.text(rest)
                        )
                if int(looked_at) < len(rests):
                    waiting.append((prefix, rests[int(looked_at) :]))
        return seen

    def _index_call(self, prefix: Plain, rests: Sequence[Plain]) -> Call[Any]:
        keys = self._partitions[prefix]
        return Call(
            "check_indexes",
            keys=(keys.sessions,),
            args=(keys.prefix, MEMBERS_A_SCRIPT, *rests),
            decode=lambda reply: reply,
            unopened=True,
        )

    def _members(self, place: Place) -> Call[Any]:
        prefix, rest = place.large[0]
        keys = self._partitions[prefix]
        return Call(
            "check_members",
            keys=(keys.sessions,),
            args=(keys.prefix, rest, place.member, MEMBERS_A_SCRIPT),
            decode=lambda reply: reply,
            unopened=True,
        )

    def _walk_members(self, place: Place, reply: Any) -> Steps:
        prefix, rest = place.large[0]
        cursor, ids = codec.text(reply[0]), map(codec.text, reply[1])
        problems = yield from self._examine({(prefix, one): [rest] for one in ids}, whole=False)
        if cursor == "0":
            return Page(problems, replace(place, large=place.large[1:], member="0"))
        return Page(problems, replace(place, member=cursor))

    # ---- Sessions -------------------------------------------------------------------------

    def _examine(
        self, seen: dict[tuple[Plain, Plain], list[Plain]], *, whole: bool
    ) -> Generator[Request[Any], Any, list[Problem]]:
        """Examine sessions, by prefix and id, each with the keys without prefix it was seen in."""
        problems: list[Problem] = []
        by_partition: dict[Plain, list[tuple[Plain, list[Plain]]]] = {}
        for (prefix, session_id), rests in seen.items():
            if "types" in rests:
                problems += yield from self._stray_type(prefix, session_id)
                rests = [rest for rest in rests if rest != "types"]
            if rests or whole:
                by_partition.setdefault(prefix, []).append((session_id, rests))
        waiting = [
            (prefix, some)
            for prefix, sessions in by_partition.items()
            for some in _in_slices(sessions, SESSIONS_A_SCRIPT)
        ]
        while waiting:
            asked, waiting = waiting[:SCRIPTS_A_ROUND_TRIP], waiting[SCRIPTS_A_ROUND_TRIP:]
            replies = yield Several(
                [self._session_call(prefix, some, whole) for prefix, some in asked], lambda r: r
            )
            for (prefix, some), (examined, answers) in zip(asked, replies, strict=True):
                if int(examined) < len(some):
                    waiting.append((prefix, some[int(examined) :]))
                for (session_id, rests), answer in zip(some, answers, strict=False):
                    problems += yield from self._answered(prefix, session_id, rests, answer, whole)
        return problems

    def _session_call(
        self, prefix: Plain, sessions: Sequence[tuple[Plain, list[Plain]]], whole: bool
    ) -> Call[Any]:
        keys = self._partitions[prefix]
        operands: list[str | int] = []
        for session_id, rests in sessions:
            operands += (session_id, len(rests), *rests)
        return Call(
            "check_sessions",
            keys=(keys.sessions,),
            args=(
                keys.prefix,
                *self._bounds(),
                "1" if whole else "",
                *operands,
            ),
            decode=lambda reply: reply,
            unopened=True,
        )

    def _bounds(self) -> tuple[int, ...]:
        overdue_us = round(OVERDUE * self.settings.reap_grace * 1_000_000)
        bounds = (self.settings.buffer_limit, self.settings.buffer_bytes)
        return (*bounds, overdue_us, WEIGHED_ENTRIES, WEIGHED_BYTES)

    def _answered(
        self,
        prefix: Plain,
        session_id: Plain,
        rests: Sequence[Plain],
        answer: Any,
        whole: bool,
    ) -> Generator[Request[Any], Any, list[Problem]]:
        service, told = codec.text(answer[0]), [tuple(map(codec.text, one)) for one in answer[1]]
        problems: list[Problem] = []
        if service and self._is_elsewhere(prefix, service):
            about = (prefix, "wrong_partition", f"session:{session_id}", "its%20service%20session")
            problems.append(self._finding(*about))
        large = [(rest, detail) for kind, rest, detail in told if kind == "large"]
        told = [one for one in told if one[0] != "large"]
        if told and self.repairs:
            problems += yield from self._repair(prefix, session_id, rests, whole=whole)
        else:
            problems += self._findings(prefix, told, session_id)
        for rest, buffer in large:
            problems += yield from self._weigh(prefix, session_id, rest, buffer)
        return problems

    def _is_elsewhere(self, prefix: Plain, service: Plain) -> bool:
        return len(self._partitions) > 1 and self.keyspace.of_service(
            _shown(service)
        ).prefix != _shown(prefix)

    def _repair(
        self, prefix: Plain, session_id: Plain, rests: Sequence[Plain], *, whole: bool
    ) -> Generator[Request[Any], Any, list[Problem]]:
        keys = self._partitions[prefix]
        found = yield Call(
            "repair_session",
            keys=(keys.sessions,),
            args=(keys.prefix, *self._bounds(), session_id, *rests),
            decode=_told_as_json,
            lane=keys.lane,
            unopened=True,
        )
        # What only people can mend was told when the session was examined whole.
        known = [one for one in found if one[0] in _WORDS]
        told = [one for one in known if whole or _WORDS[cast("ProblemKind", one[0])].mendable]
        return self._findings(prefix, told, session_id, repaired=True)

    def _stray_type(
        self, prefix: Plain, name: Plain
    ) -> Generator[Request[Any], Any, list[Problem]]:
        if f"{prefix}sessions:type:{name}" in self._lacking:
            return []
        if not self.repairs:
            return self._findings(prefix, [("index_orphan", "types", name)])
        found = yield self._repair_key(prefix, "types", name)
        return self._findings(prefix, found, repaired=True)

    # ---- Large buffers --------------------------------------------------------------------

    def _weigh(
        self, prefix: Plain, session_id: Plain, rest: Plain, buffer: str
    ) -> Generator[Request[Any], Any, list[Problem]]:
        """Weigh a large buffer piece by piece; see ``lua/include/pieces.lua``."""
        keys = self._partitions[prefix]
        own = (keys.prefix + f"session:{_shown(session_id)}", keys.prefix + _shown(rest))
        room = (WEIGHED_ENTRIES, WEIGHED_BYTES)
        begin, end, weight = "", "", "0"
        for _ in range(MOST_PIECES):
            reply = yield Call(
                "check_buffer", own, (buffer, begin, end, weight, *room), lambda r: r, unopened=True
            )
            begin, end, weight = (codec.text(part) for part in reply[:3])
            verdict, said = codec.text(reply[3]), codec.text(reply[4])
            if verdict == "gone" or verdict == said:
                return []
            if verdict.isdecimal():
                break
        else:
            return []
        if not self.repairs:
            return self._findings(prefix, [("buffer_bytes", rest, said)], session_id)
        answer = yield Call(
            "repair_buffer",
            keys=own,
            args=(buffer, begin, end, weight, *room),
            decode=codec.done,
            lane=keys.lane,
            unopened=True,
        )
        if not answer.startswith("was "):
            return []  # right by now, or left to the next run
        found = [("buffer_bytes", rest, answer.removeprefix("was "))]
        return self._findings(prefix, found, session_id, repaired=True)

    # ---- The end --------------------------------------------------------------------------

    def _end(self, drift: Drift) -> Steps:
        problems: list[Problem] = []
        if self._layout_missing and self._keys_seen:
            problems += yield from self._lay_out()
        if drift.found:
            counted = (
                f"{drift.sessions} listed, {drift.by_status} by status, {drift.by_type} by type, "
                f"{drift.by_time} by time"
            )
            problems.append(self._told("drift", self.keyspace.all[0].sessions, counted))
        return Page(problems, None)

    def _lay_out(self) -> Generator[Request[Any], Any, list[Problem]]:
        """Write this store's layout, unless there are keys of another."""
        problem = self._told("layout_missing", self.keyspace.meta, self._layout_missing)
        if self._foreign_seen:
            return [problem.model_copy(update={"mendable": False, "mending": "nothing: there are "
                                               "keys of another layout"})]  # fmt: skip
        if not self.repairs:
            return [problem]
        yield self._repair_key(_plain(self._beside.prefix), "meta")
        yield replace(opening.open_store(self.keyspace, self.settings), unopened=True)
        return [problem.model_copy(update={"repaired": True})]

    # ---- In words -------------------------------------------------------------------------

    def _findings(
        self,
        prefix: Plain,
        found: Iterable[Sequence[str]],
        session_id: Plain | None = None,
        *,
        repaired: bool = False,
    ) -> list[Problem]:
        problems: list[Problem] = []
        for kind, rest, detail in found:
            name = prefix + rest
            if kind == "wrong_type":
                if name in self._spoilt:
                    continue
                self._spoilt.add(name)
            elif repaired and kind == "index_missing" and name in self._spoilt:
                continue  # rebuilt: that was told
            elif kind == "index_missing" and rest.startswith("sessions:type:") and not repaired:
                self._lacking.add(name)
            problems.append(
                self._finding(prefix, kind, rest, detail, session_id, repaired=repaired)
            )
        return problems

    def _finding(
        self,
        prefix: Plain,
        kind: str,
        rest: Plain,
        detail: Plain,
        session_id: Plain | None = None,
        *,
        repaired: bool = False,
    ) -> Problem:
        own = re.match(r"session:([^:]+)", rest)
        if own is not None:
            session_id = own[1]
        elif kind in _ABOUT_A_MEMBER:
            session_id = session_id if rest == "types" else detail
        elif not rest.startswith("sessions:") or kind == "wrong_type":
            session_id = None
        problem = self._told(
            cast("ProblemKind", kind), _shown(prefix) + _shown(rest), _shown(detail)
        )
        return problem.model_copy(
            update={
                "session_id": None if session_id is None else _shown(session_id),
                "repaired": repaired and problem.mendable,
            }
        )

    def _told(self, kind: ProblemKind, key: str, detail: str) -> Problem:
        words = _WORDS[kind]
        return Problem(
            kind=kind,
            key=key,
            message=words.message.replace("{detail}", detail),
            mending=words.mending,
            mendable=words.mendable,
            warning=words.warning,
        )


def _in_slices(items: list[T], length: int) -> list[list[T]]:
    return [items[at : at + length] for at in range(0, len(items), length)]


def _told_as_json(reply: Any) -> list[Sequence[str]]:
    told: list[Sequence[str]] = json.loads(codec.done(reply))
    return told


def _escaped(text: str) -> str:
    """A pattern of SCAN that matches just this text."""
    return re.sub(r"([*?\[\]\\^-])", r"\\\1", text)
