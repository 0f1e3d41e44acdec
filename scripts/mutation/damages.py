"""Small damages to the Lua scripts, each with the tests that are to notice it.

A damage is one text of one file, found there exactly once, and what it becomes. ``tests`` are what
pytest is given, the likeliest first.
"""

from __future__ import annotations

from dataclasses import dataclass

MODEL = "test_model.py"
BUFFERS = "test_contract_buffers.py"
INDEXES = "test_contract_indexes.py"
ORIGINAL = "test_contract_original.py"
LEASES = "test_contract_leases.py"
REAP = "test_contract_reap.py"
LOST = "test_contract_writes_lost.py"
LISTING = "test_contract_listing.py"
ITERATION = "test_iteration.py"
METADATA = "test_contract_metadata.py"
FOLLOW = "test_contract_follow.py"
WATCH = "test_contract_watch.py"
LANES = "test_lanes.py"
ONCE = "test_exactly_once.py"
TYPES = "test_lua_contracts.py"
MEMORY = "test_memory_limit.py"
BOUNDS = "test_lua_bounds.py"
DOCTOR = "test_contract_doctor.py"
EXPORT = "test_contract_export.py"


@dataclass(frozen=True, slots=True)
class Damage:
    """What is done to a script, why that is a mistake, and the files with tests that must fail."""

    file: str
    text: str
    becomes: str
    why: str
    tests: tuple[str, ...]


def _damage(file: str, why: str, text: str, becomes: str, *tests: str) -> Damage:
    return Damage(f"{file}.lua", text, becomes, why, tests)


ONCE_LUA = [
    _damage(
        "include/once", "a repeat runs again",
        "if last_sequence == sequence then", "if false then",
        LANES, ONCE,
    ),
    _damage(
        "include/once", "a late duplicate runs",
        "elseif tonumber(last_sequence) > tonumber(sequence) then", "elseif false then",
        ONCE,
    ),
    _damage(
        "include/once", "a refusal is not remembered",
        "return remember(code .. ' ' .. cjson.encode(details))",
        "return code .. ' ' .. cjson.encode(details)",
        LANES, ONCE,
    ),
    _damage(
        "include/once", "a repeat does not keep its lane alive",
        "    redis.call('PEXPIRE', lane, 2 * LANE_MS)\n", "",
        LANES,
    ),
    _damage(
        "include/once", "a lane lasts for ever once it is used again",
        "answer, 'KEEPTTL')", "answer)",
        LANES, MODEL,
    ),
    _damage(
        "include/once", "a lane lasts for ever",
        "answer, 'PX', 2 * LANE_MS)", "answer)",
        LANES, MODEL,
    ),
    _damage(
        "include/once", "a lane in use runs out",
        "if redis.call('PTTL', lane) >= LANE_MS then", "if redis.call('PTTL', lane) >= 0 then",
        LANES,
    ),
    _damage(
        "include/once", "what shrinks is refused at full memory",
        "  redis.call('DEL', lane)\n", "",
        MEMORY,
    ),
]  # fmt: skip

FENCE_AND_LEASE = [
    _damage(
        "include/fence", "force does not pass",
        "if given == 'force' then", "if false then",
        MODEL, LEASES,
    ),
    _damage(
        "include/fence", "a stale fence passes while another worker holds the session",
        "if not owner or own ~= fence then", "if not owner then",
        MODEL, LEASES,
    ),
    _damage(
        "include/fence", "a stale fence passes after its lease was ended",
        "if not owner or own ~= fence then", "if own ~= fence then",
        MODEL, LEASES,
    ),
    _damage(
        "include/fence", "lost entries are not noticed",
        "elseif lost == 0 then", "elseif true then",
        LOST,
    ),
    _damage(
        "include/known", "what the server has lost of the errors is not counted",
        " + missing(errors, error_total)", "",
        LOST,
    ),
    _damage(
        "include/known", "what the server has lost of the output is not counted",
        "missing(output, output_total) + missing", "missing",
        LOST,
    ),
    _damage(
        "include/known", "more entries than the worker knows count as lost",
        "math.max(tonumber(expected) - count_of(total), 0)",
        "math.abs(tonumber(expected) - count_of(total))",
        LEASES, LOST,
    ),
    _damage(
        "include/fence", "whoever has no lease writes to a held session",
        "if is_live(owner, expires_at, now) then", "if false then",
        MODEL, LEASES,
    ),
    _damage(
        "include/fence", "a refusal does not say who holds the session",
        "status = status or nil, owner = owner or nil})", "status = status or nil})",
        MODEL, LEASES,
    ),
    _damage(
        "include/lease", "a lease lives when it has expired, and not before",
        "expires_at > now", "expires_at < now",
        MODEL, LEASES,
    ),
    _damage(
        "include/lease", "a lease without an end is live",
        "return owner and expires_at and expires_at > now", "return owner",
        MODEL, LEASES,
    ),
    _damage(
        "include/lease", "the reaper's mark outlives the lease",
        "'owner', 'lease_expires_at', 'reap_seen_ms')", "'owner', 'lease_expires_at')",
        MODEL, REAP,
    ),
    _damage(
        "include/lease", "an ended lease stays in leases",
        "  redis.call('ZREM', prefix .. 'leases', id)\n", "",
        MODEL, LEASES,
    ),
    _damage(
        "include/lease", "a released session stays in its owner's set",
        "  redis.call('SREM', prefix .. 'sessions:owner:' .. owner, id)\n", "",
        MODEL, LEASES,
    ),
]  # fmt: skip

APPEND = [
    _damage(
        "include/append", "appending to a session that is not there leaves a stub",
        "if not status then", "if false then",
        MODEL, ORIGINAL,
    ),
    _damage(
        "include/append", "a write without a fence is not checked",
        "(owner or given ~= '') and fenced_off", "given ~= '' and fenced_off",
        MODEL, LEASES,
    ),
    _damage(
        "include/append", "an ended session comes into activity",
        "if not ENDED[status] then", "if true then",
        MODEL, INDEXES,
    ),
    _damage(
        "include/append", "one entry too many stays",
        "trimmed = math.min(length - most_entries, most_trimmed)",
        "trimmed = math.min(length - most_entries - 1, most_trimmed)",
        MODEL, BUFFERS,
    ),
    _damage(
        "include/append", "trimmed entries are not taken off the bytes in full",
        "'LPOP', list, trimmed)) do\n      bytes = bytes - #entry - ENTRY_OVERHEAD",
        "'LPOP', list, trimmed)) do\n      bytes = bytes - #entry",
        MODEL, BUFFERS,
    ),
    _damage(
        "include/append", "entries trimmed for their bytes are not taken off in full",
        "if bytes <= most_bytes then break end\n      bytes = bytes - #entry - ENTRY_OVERHEAD",
        "if bytes <= most_bytes then break end\n      bytes = bytes - #entry",
        MODEL, BUFFERS,
    ),
    _damage(
        "include/append", "a buffer that exactly fits its bytes is trimmed",
        "while bytes > most_bytes and gone < most_trimmed do\n"
        "    local average = math.max(1, bytes / (length - gone))\n"
        "    local wanted = math.min(math.ceil((bytes - most_bytes) / average), 128, "
        "most_trimmed - gone)",
        "while bytes >= most_bytes and gone < most_trimmed do\n"
        "    local average = math.max(1, bytes / (length - gone))\n"
        "    local wanted = math.min(math.ceil((bytes - most_bytes + 1) / average), 128, "
        "most_trimmed - gone)",
        BUFFERS, MODEL,
    ),
    _damage(
        "include/append", "a slice of entries is trimmed to its end",
        "      if bytes <= most_bytes then break end\n", "",
        MODEL, BUFFERS,
    ),
    _damage(
        "include/append", "the newest entry goes too",
        "math.min(added + MORE_TRIMMED, length - 1)", "math.min(added + MORE_TRIMMED, length)",
        MODEL, BUFFERS,
    ),
    _damage(
        "include/append", "one append trims without a bound",
        "local MORE_TRIMMED = 1000 ", "local MORE_TRIMMED = 100000 ",
        BUFFERS,
    ),
    _damage(
        "include/append", "more values than unpack takes",
        "local SLICE = 4000 ", "local SLICE = 40000 ",
        BUFFERS,
    ),
    _damage(
        "include/append", "followers are not woken",
        "  wake(list, total)\n", "",
        FOLLOW,
    ),
    _damage(
        "include/append", "a list of the wrong type fails after the first write",
        "  redis.call('LLEN', list) ", "  local _ = 0 ",
        TYPES,
    ),
    _damage(
        "include/append", "an append is no activity",
        "'last_activity', iso(now_us),\n    total_field", "total_field",
        MODEL, ORIGINAL,
    ),
    _damage(
        "include/append", "the overhead of entries is not counted",
        "+ added * ENTRY_OVERHEAD", "",
        MODEL, BUFFERS,
    ),
    _damage(
        "include/append", "the total is what is held, not what there ever was",
        "integer(tonumber(stored[2] or 0) + added)",
        "integer(redis.call('LLEN', list) + added)",
        MODEL, BUFFERS,
    ),
]  # fmt: skip

STATUS = [
    _damage(
        "include/move", "the old status keeps the session",
        "    redis.call('SREM', prefix .. 'sessions:status:' .. old, id)\n",
        "    run_at_full_memory()\n",
        MODEL, INDEXES,
    ),
    _damage(
        "include/move", "the new status does not get it",
        "    redis.call('SADD', prefix .. 'sessions:status:' .. new, id)\n", "",
        MODEL, INDEXES,
    ),
    _damage(
        "include/move", "a change of status does not move activity",
        "    redis.call('ZADD', activity, integer(now_us), id)\n", "",
        MODEL, INDEXES,
    ),
    _damage(
        "include/move", "a session that has ended ends again",
        "if ENDED[old] ~= ENDED[new] then", "if ENDED[old] ~= ENDED[new] or ENDED[new] then",
        INDEXES,
    ),
    _damage(
        "include/move", "an ended session stays in activity",
        "      redis.call('ZREM', activity, id)\n", "",
        MODEL, INDEXES,
    ),
    _damage(
        "include/move", "a session that goes on stays among the ended",
        "      redis.call('ZREM', ended, id)\n", "",
        MODEL, INDEXES,
    ),
    _damage(
        "include/move", "the end of a session wakes no follower of its output",
        "      wake_followers(prefix .. 'session:' .. id, 'ended')\n", "",
        FOLLOW,
    ),
    _damage(
        "update_status", "others change the status of a held session",
        "if refused then\n  return refused\nend\n", "",
        MODEL, LEASES,
    ),
    _damage(
        "update_status", "force with busy leaves the lease",
        "owner and (new ~= 'busy' or given == 'force')", "owner and new ~= 'busy'",
        LEASES,
    ),
    _damage(
        "update_status", "busy gives a session back",
        "owner and (new ~= 'busy' or given == 'force')", "owner",
        LEASES,
    ),
    _damage(
        "update_status", "one expected status is taken for none",
        "local expected = #ARGV < FIRST_EXPECTED", "local expected = #ARGV <= FIRST_EXPECTED",
        MODEL,
    ),
    _damage(
        "update_status", "any status is expected",
        "expected = expected or ARGV[i] == old", "expected = true",
        MODEL,
    ),
    _damage(
        "update_status", "a change of status is no activity",
        "'status', new, 'last_activity', iso(now_us))", "'status', new)",
        MODEL, ORIGINAL,
    ),
    _damage(
        "update_status", "a released lease is not ended",
        "  end_lease(prefix, id, owner)\n", "",
        MODEL, LEASES,
    ),
    _damage(
        "update_status", "keeping a status is an event",
        "elseif old ~= new then", "else",
        MODEL, INDEXES,
    ),
    _damage(
        "update_status", "a stream of the wrong type leaves the change half done",
        "must_be('stream', events)\n", "",
        TYPES,
    ),
    _damage(
        "update_status", "an owner's set of the wrong type leaves the change half done",
        "  must_be('set', prefix .. 'sessions:owner:' .. owner)\n", "",
        TYPES,
    ),
    _damage(
        "update_activity", "touching a session that is not there leaves a stub",
        "if not status then", "if false then",
        MODEL, ORIGINAL,
    ),
    _damage(
        "update_activity", "touching an ended session brings it into activity",
        "if not ENDED[status] then", "if true then",
        MODEL, INDEXES,
    ),
    _damage(
        "update_activity", "activity is not dated",
        "redis.call('HSET', session, 'last_activity', iso(now_us))\n", "",
        MODEL, ORIGINAL,
    ),
]  # fmt: skip

CLAIM = [
    _damage(
        "claim", "two workers claim one session",
        "if is_live(owner, expires_at, now) then", "if false then",
        MODEL, LEASES,
    ),
    _damage(
        "claim", "an expired lease does not free a session",
        "local expected = owner\n", "local expected = false\n",
        MODEL, LEASES,
    ),
    _damage(
        "claim", "any status can be claimed",
        "expected = expected or ARGV[i] == old", "expected = true",
        MODEL, LEASES,
    ),
    _damage(
        "claim", "the first expected status is passed over",
        "local FIRST_EXPECTED = 6", "local FIRST_EXPECTED = 7",
        MODEL, LEASES,
    ),
    _damage(
        "claim", "a fence does not grow when the clock stands still or went back",
        "math.max((tonumber(fence) or 0) + 1, now_ms)", "now_ms",
        LEASES,
    ),
    _damage(
        "claim", "a fence does not grow with the clock",
        "math.max((tonumber(fence) or 0) + 1, now_ms)", "(tonumber(fence) or 0) + 1",
        MODEL, LEASES,
    ),
    _damage(
        "claim", "a lease is in no list of leases",
        "redis.call('ZADD', leases, integer(now_ms + ttl_ms), id)\n", "",
        MODEL, LEASES,
    ),
    _damage(
        "claim", "the owner's set does not get the session",
        "redis.call('SADD', new_owner_index, id)\n", "",
        MODEL, LEASES,
    ),
    _damage(
        "claim", "the lost worker keeps the session in its set",
        "  end_lease(prefix, id, owner)\n", "",
        MODEL, LEASES,
    ),
    _damage(
        "claim", "the end of the lost lease is no event",
        "  event(events, 'lease_expired', id, type, worker, 'owner', owner)\n", "",
        MODEL, LEASES,
    ),
    _damage(
        "claim", "a set of the wrong type leaves the claim half done",
        "old, busy_index, new_owner_index)", "old, busy_index)",
        TYPES,
    ),
    _damage(
        "claim", "a lease lasts a thousand times too long",
        "iso((now_ms + ttl_ms) * 1000))\nredis.call('ZADD', leases, integer(now_ms + ttl_ms), id)",
        "iso((now_ms + ttl_ms * 1000) * 1000))\n"
        "redis.call('ZADD', leases, integer(now_ms + ttl_ms * 1000), id)",
        MODEL, LEASES,
    ),
    _damage(
        "renew", "a lost lease is renewed",
        "if owner and fence == own then", "if owner then",
        LEASES,
    ),
    _damage(
        "renew", "a released lease is renewed",
        "if owner and fence == own then", "if fence == own then",
        LEASES,
    ),
    _damage(
        "renew", "a renewal finds no loss",
        "answers[#answers + 1] = lost", "answers[#answers + 1] = 0",
        LOST,
    ),
    _damage(
        "claim", "what was there at the claim is not told",
        "integer(count_of(output_total))", "'0'",
        LOST,
    ),
    _damage(
        "include/known", "a total that is no number is taken for one",
        "string.match(total, '^%d+$') and tonumber(total)", "tonumber(total)",
        LOST,
    ),
    _damage(
        "renew", "a renewal leaves the reaper's mark",
        "    redis.call('HDEL', KEYS[i], 'reap_seen_ms')\n", "",
        MODEL, REAP,
    ),
    _damage(
        "renew", "a renewal is in the hash alone",
        "    redis.call('ZADD', leases, integer(now_ms + ttl_ms), id)\n", "",
        MODEL, LEASES,
    ),
    _damage(
        "renew", "full memory kills every lease",
        "run_at_full_memory()\n", "",
        MEMORY,
    ),
]  # fmt: skip

CREATE_AND_DELETE = [
    _damage(
        "create_session", "an id is used twice",
        "if redis.call('EXISTS', session) == 1 then", "if false then",
        ORIGINAL, INDEXES, LANES,
    ),
    _damage(
        "create_session", "a starting session does not keep its service session",
        "ipairs({'starting', 'active', 'busy'})", "ipairs({'active', 'busy'})",
        MODEL, ORIGINAL,
    ),
    _damage(
        "create_session", "times of creation may be equal",
        "tonumber(newest[2]) + 1 or 0", "tonumber(newest[2]) or 0",
        ORIGINAL, INDEXES,
    ),
    _damage(
        "create_session", "the order of creation follows a clock that went back",
        "math.max(now_us, newest[2] and tonumber(newest[2]) + 1 or 0)", "now_us",
        ORIGINAL, INDEXES,
    ),
    _damage(
        "create_session", "a session created as ended is among the live",
        "ENDED[status] and ended or activity", "activity",
        MODEL, INDEXES,
    ),
    _damage(
        "create_session", "metrics do not know the type",
        "redis.call('SADD', types, type)\n", "",
        MODEL, INDEXES,
    ),
    _damage(
        "create_session", "the last index is left out",
        "for i = FIRST_INDEX, #KEYS do", "for i = FIRST_INDEX, #KEYS - 1 do",
        MODEL, INDEXES,
    ),
    _damage(
        "create_session", "each new session clears one expired at most",
        "local MOST_CLEARED, MOST_WALKED = 2, 20", "local MOST_CLEARED, MOST_WALKED = 1, 20",
        REAP,
    ),
    _damage(
        "create_session", "retention clears nothing",
        "  remove(prefix, one.id, one.removal, actor)\n", "",
        REAP,
    ),
    _damage(
        "delete_session", "others delete a held session",
        "if refused then\n  return refused\nend\n", "",
        MODEL, LEASES,
    ),
    _damage(
        "delete_session", "deleting what is not there is told as deleting",
        "  return done('0')", "  return done('1')",
        MODEL, ORIGINAL,
    ),
    _damage(
        "delete_session", "at full memory nobody is told that there was nothing to delete",
        "  run_at_full_memory()\n", "",
        MEMORY,
    ),
    _damage(
        "delete_session", "a set of the wrong type leaves the session half deleted",
        "must_be('set', types, unpack(removal.sets))", "must_be('set', types)",
        TYPES,
    ),
    _damage(
        "include/removal", "the error buffer stays",
        "redis.call('UNLINK', session, session .. ':output', session .. ':errors')",
        "redis.call('UNLINK', session, session .. ':output')",
        MODEL, INDEXES,
    ),
    _damage(
        "include/removal", "the lease stays",
        "'activity', 'ended', 'leases'}) do", "'activity', 'ended'}) do",
        MODEL, LEASES,
    ),
    _damage(
        "include/removal", "the end stays",
        "'activity', 'ended', 'leases'}) do", "'activity', 'leases'}) do",
        MODEL, INDEXES,
    ),
    _damage(
        "include/removal", "the sets keep the id",
        "    redis.call('SREM', set, id)\n", "    redis.call('SCARD', set)\n",
        MODEL, INDEXES,
    ),
    _damage(
        "include/removal", "the owner's set keeps the id",
        "'service', 'task', 'mcp', 'owner'}) do", "'service', 'task', 'mcp'}) do",
        MODEL, LEASES,
    ),
    _damage(
        "include/removal", "a type that no session has stays",
        "redis.call('SREM', prefix .. 'types', type)", "redis.call('SCARD', prefix .. 'types')",
        MODEL, INDEXES,
    ),
    _damage(
        "include/removal", "a type is forgotten that others have",
        "if type and redis.call('EXISTS', prefix .. 'sessions:type:' .. type) == 0 then",
        "if type then",
        MODEL, INDEXES,
    ),
    _damage(
        "include/removal", "who missed errors is told how much output",
        "'error_total', removal.error_total)", "'error_total', removal.output_total)",
        MODEL, FOLLOW,
    ),
    _damage(
        "include/removal", "a deletion wakes no follower",
        "  wake_followers(session, 'deleted')\n", "",
        FOLLOW,
    ),
    _damage(
        "include/expired", "what has not been kept for its time is cleared",
        "integer(now_us - ended_us)", "integer(now_us)",
        MODEL, REAP,
    ),
    _damage(
        "include/expired", "more are cleared than asked for",
        "    if #found == most then break end\n", "",
        REAP,
    ),
    _damage(
        "include/expired", "a session that lives is deleted because others listed it as ended",
        "removal and ENDED[removal.status] and", "removal and",
        REAP,
    ),
]  # fmt: skip

REAPING = [
    _damage(
        "reap", "a mark from before an outage ends a session",
        "age_ms > 3 * grace_ms", "age_ms > 300 * grace_ms",
        MODEL, REAP,
    ),
    _damage(
        "reap", "two passes at once end a session",
        "elseif age_ms >= grace_ms and lost < most then", "elseif lost < most then",
        MODEL, REAP,
    ),
    _damage(
        "reap", "a mark from the future counts",
        "not age_ms or age_ms < 0 or", "not age_ms or",
        REAP,
    ),
    _damage(
        "reap", "an entry of leases alone ends a session",
        "if found and found.owner and not is_live(found.owner, found.expires_at, now) then",
        "if found and found.owner then",
        REAP,
    ),
    _damage(
        "reap", "a quiet session is taken from its worker",
        "if found and not found.owner and not ENDED[found.status] then",
        "if found and not ENDED[found.status] then",
        MODEL, REAP,
    ),
    _damage(
        "reap", "a dry run marks",
        "          if not only_tell then\n            redis.call('HSET', found.key, 'reap_seen_ms'",
        "          if true then\n            redis.call('HSET', found.key, 'reap_seen_ms'",
        REAP,
    ),
    _damage(
        "reap", "a dry run ends",
        "local function lose(id, found)\n  if only_tell then",
        "local function lose(id, found)\n  if false then",
        REAP,
    ),
    _damage(
        "reap", "a dry run moves the place to go on from",
        "local function go_on_at(candidate)\n  if only_tell then",
        "local function go_on_at(candidate)\n  if false then",
        REAP, MODEL,
    ),
    _damage(
        "reap", "a lost worker's lease stays",
        "  end_lease(prefix, id, found.owner)\n", "",
        MODEL, REAP,
    ),
    _damage(
        "reap", "the line about a lost worker is not weighed in full",
        "#line + ENTRY_OVERHEAD", "#line",
        MODEL, REAP,
    ),
    _damage(
        "reap", "the line about a lost worker is not counted",
        "or 0) + 1),\n    'error_bytes'", "or 0)),\n    'error_bytes'",
        MODEL, REAP,
    ),
    _damage(
        "reap", "the newest line goes too",
        "trimmed < MOST_WALKED and length > 1 and", "trimmed < MOST_WALKED and length > 0 and",
        REAP, MODEL,
    ),
    _damage(
        "reap", "one more is lost than asked for",
        "age_ms >= grace_ms and lost < most", "age_ms >= grace_ms and lost <= most",
        REAP, MODEL,
    ),
    _damage(
        "reap", "one more is terminated than asked for",
        "if terminated == most then break end", "if terminated > most then break end",
        REAP, MODEL,
    ),
    _damage(
        "reap", "a long head of held sessions starves the others",
        "or walked == MOST_WALKED\n", "\n",
        REAP,
    ),
    _damage(
        "reap", "a pass ends with its first script",
        "local following = kind <= ENDED_ONES\n", "local following = false\n",
        REAP,
    ),
    _damage(
        "reap", "the next script of a pass looks at the same heads again",
        "    offset = offset + 1\n", "",
        REAP,
    ),
    _damage(
        "reap", "passes do not begin at the head again",
        "go_on_at(cut_off and stopped or nil)", "go_on_at(stopped)",
        REAP, MODEL,
    ),
    _damage(
        "reap", "an idle session's end is no event",
        "        event(events, 'status_changed'", "        local _ = (events and 'status_changed'",
        MODEL, REAP,
    ),
    _damage(
        "reap", "full memory keeps the dead alive",
        "if not only_tell then\n  run_at_full_memory()\nend\n", "",
        MEMORY, TYPES,
    ),
    _damage(
        "reap", "a spoilt error buffer tears a lost session",
        "if not are('hash', session) or not are('list', session .. ':errors') then",
        "if not are('hash', session) then",
        REAP,
    ),
]  # fmt: skip

READING = [
    _damage(
        "read_buffer", "a page begins before what is still there",
        "math.min(math.max(cursor, oldest), total)", "math.min(cursor, total)",
        MODEL, BUFFERS,
    ),
    _damage(
        "read_buffer", "a cursor beyond the end stays there",
        "math.min(math.max(cursor, oldest), total)", "math.max(cursor, oldest)",
        BUFFERS,
    ),
    _damage(
        "read_buffer", "a page has one entry too many",
        "math.min(step, limit - #entries) - 1", "math.min(step, limit - #entries)",
        MODEL, BUFFERS,
    ),
    _damage(
        "read_buffer", "a page is over its bytes",
        "if #entries > 0 and size + #entry > PAGE_BYTES then",
        "if #entries > 0 and size > PAGE_BYTES then",
        BUFFERS,
    ),
    _damage(
        "read_buffer", "an entry larger than a page is never read",
        "if #entries > 0 and size + #entry > PAGE_BYTES then",
        "if size + #entry > PAGE_BYTES then",
        BUFFERS,
    ),
    _damage(
        "find_sessions", "a page begins with the last of the page before",
        "if not seen or before(seen, candidate) then\n        following",
        "if true then\n        following",
        ITERATION, LISTING,
    ),
    _damage(
        "find_sessions", "a listing ends with its first page",
        "return following, #head == walked", "return following, false",
        ITERATION, LISTING,
    ),
    _damage(
        "find_sessions", "idle is what was just active",
        "return last ~= nil and last <= idle_until", "return last ~= nil and last > idle_until",
        LISTING, MODEL,
    ),
    _damage(
        "find_sessions", "only the smallest filter counts",
        "if filter ~= smallest and not filter.holds(id) then return false end", "",
        LISTING, MODEL,
    ),
    _damage(
        "find_sessions", "what does not fit a page is never given",
        "    more = true\n    break\n  end\n  if matches", "    break\n  end\n  if matches",
        LISTING, BOUNDS,
    ),
    _damage(
        "find_sessions", "a page has no bound of bytes",
        "if #rows == most_rows or room <= 0 then", "if #rows == most_rows then",
        BOUNDS,
    ),
    _damage(
        "find_sessions", "the latest active comes last",
        "  if not by_creation then\n    a, b = b, a\n  end\n", "",
        LISTING, MODEL,
    ),
    _damage(
        "find_sessions", "of two sets one is walked further than the other is known",
        "while (live[i] or not more_live) and", "while",
        BOUNDS,
    ),
    _damage(
        "find_sessions", "a session of the same microsecond is passed over",
        "  return a.id < b.id\n", "  return false\n",
        LISTING, ITERATION,
    ),
    _damage(
        "find_sessions", "ended sessions are never idle",
        "for _, id in ipairs(redis.call('ZRANGEBYSCORE', ended, '-inf', bound)) do",
        "for _, id in ipairs({}) do",
        LISTING, MODEL,
    ),
    _damage(
        "find_sessions", "all of a large index is taken at once",
        "local smallest, smallest_size = nil, MOST_WALKED + 1",
        "local smallest, smallest_size = nil, 1000 * MOST_WALKED",
        ITERATION,
    ),
    _damage(
        "find_session_by_service_id", "the latest is found",
        "created < earliest_created)", "created > earliest_created)",
        MODEL, ORIGINAL,
    ),
    _damage(
        "find_session_by_service_id", "an ended session counts as live",
        "and not (live and ENDED[redis.call('HGET', prefix .. 'session:' .. id, 'status')])", "",
        MODEL, ORIGINAL,
    ),
    _damage(
        "find_session_by_service_id", "any number of sessions is walked",
        "if redis.call('SCARD', index) > MOST_WALKED then", "if false then",
        BOUNDS,
    ),
    _damage(
        "get_metrics", "a status is left out",
        "for i = 2, #ARGV do", "for i = 2, #ARGV - 1 do",
        MODEL, INDEXES,
    ),
    _damage(
        "read_events", "a watcher gets its last event again",
        "redis.call('XRANGE', events, '(' .. seen,", "redis.call('XRANGE', events, seen,",
        WATCH,
    ),
    _damage(
        "read_events", "a gap is not told",
        "seen ~= '0-0' and #redis.call('XRANGE', events, seen, seen) == 0", "false",
        WATCH,
    ),
    _damage(
        "read_events", "a gap is told from the beginning on",
        "#following > 0 and seen ~= '0-0' and", "#following > 0 and",
        WATCH,
    ),
    _damage(
        "find_deleted", "another session's deletion is told",
        "fields.event == 'deleted' and fields.session_id == id", "fields.event == 'deleted'",
        FOLLOW, MODEL,
    ),
    _damage(
        "find_deleted", "a deletion is found among the newest events only",
        "#walked == MOST_WALKED and '('", "false and '('",
        FOLLOW,
    ),
    _damage(
        "include/event", "watchers are not woken",
        "  wake(stream, name)\n", "",
        FOLLOW,
    ),
    _damage(
        "include/event", "events are kept without a bound",
        "'MAXLEN', '~', EVENTS_KEPT, '*'", "'*'",
        BOUNDS,
    ),
    _damage(
        "update_metadata", "noting something of a session that is not there leaves a stub",
        "if #fields == 0 then", "if false then",
        MODEL, METADATA,
    ),
    _damage(
        "update_metadata", "the last name that fits is refused",
        "count > most_names", "count >= most_names",
        METADATA,
    ),
    _damage(
        "update_metadata", "a name that is set again counts twice",
        "count = count + (names[ARGV[i]] and 0 or 1)", "count = count + 1",
        METADATA, MODEL,
    ),
    _damage(
        "update_metadata", "removing what is not there makes room",
        "count = count - (names[ARGV[i]] and 1 or 0)", "count = count - 1",
        METADATA, MODEL,
    ),
    _damage(
        "open_store", "a new namespace is not laid out",
        "redis.pcall('HSET', KEYS[1], unpack(ARGV))", "1",
        MODEL, INDEXES,
    ),
    _damage(
        "open_store", "the layout is written over",
        "if #meta == 0 then", "if true then",
        "test_contract_settings.py",
    ),
]  # fmt: skip

TRANSFER = [
    _damage(
        "export_sessions", "of sessions of one microsecond only the first page is exported",
        "(us == seen_us and id > seen_id)", "false",
        EXPORT,
    ),
    _damage(
        "export_sessions", "filters do not matter",
        "if matches(candidate.id) then", "if true then",
        EXPORT,
    ),
    _damage(
        "export_sessions", "what became idle at this moment is not idle",
        "tonumber(last) <= idle_until", "tonumber(last) > idle_until",
        EXPORT,
    ),
    _damage(
        "export_sessions", "a spoilt session ends the export",
        "if not are('hash', session) or not are('list', output, errors) then", "if false then",
        EXPORT,
    ),
    _damage(
        "export_sessions", "large buffers make a reply of any size",
        "expected_bytes(stored[2], row[9]) > room", "expected_bytes(stored[2], row[9]) < 0",
        EXPORT,
    ),
    _damage(
        "export_sessions", "the errors are those of the output",
        "redis.call('LRANGE', errors, 0, -1)", "redis.call('LRANGE', output, 0, -1)",
        EXPORT,
    ),
    _damage(
        "export_sessions", "a page that was cut short is taken for the last",
        "    more = true\n    break\n  end\n  if matches", "    break\n  end\n  if matches",
        EXPORT,
    ),
    _damage(
        "import_session", "a session that is there is written over",
        "if replace ~= '1' then", "if false then",
        EXPORT,
    ),
    _damage(
        "import_session", "a session that is held is replaced",
        "  if refused then\n    return refused\n  end\n", "",
        EXPORT,
    ),
    _damage(
        "import_session", "a part that was lost is not missed",
        "~= tonumber(count) + 1) then", "== nil) then",
        EXPORT,
    ),
    _damage(
        "import_session", "another import's parts are taken for one's own",
        "redis.call('LINDEX', staged, 0) ~= token", "false",
        EXPORT,
    ),
    _damage(
        "import_session", "a replaced session keeps its old indexes",
        "  remove(prefix, id, removal, actor)\n", "",
        EXPORT,
    ),
    _damage(
        "import_session", "the type of a replaced session is forgotten",
        "  redis.call('SADD', types, type)\nend\n", "end\n",
        EXPORT,
    ),
    _damage(
        "import_session", "a worker from before the export still holds the session",
        "integer(owned and fence + 1 or fence)", "integer(fence)",
        EXPORT,
    ),
    _damage(
        "import_session", "a lease goes on in the import",
        "math.min(expires_ms, math.floor(now_us / 1000))", "expires_ms",
        EXPORT,
    ),
    _damage(
        "import_session", "an expired lease is not to be reaped",
        "  redis.call('ZADD', leases, integer(expired_ms), id)\n", "",
        EXPORT,
    ),
    _damage(
        "import_session", "a large buffer begins with the token of its import",
        "    redis.call('LPOP', staged)   -- the token\n", "",
        EXPORT,
    ),
    _damage(
        "import_session", "a large buffer disappears after an hour",
        "      redis.call('PERSIST', list)\n", "",
        EXPORT,
    ),
    _damage(
        "import_session", "an ended session is among the living",
        "ENDED[status] and ended or activity", "activity",
        EXPORT,
    ),
    _damage(
        "import_session", "it is not in its index sets",
        "  redis.call('SADD', KEYS[i], id)\n", "",
        EXPORT,
    ),
    _damage(
        "stage_buffer", "parts are staged for a session that is there",
        "if only_new and redis.call('EXISTS', session) == 1 then", "if false then",
        EXPORT,
    ),
    _damage(
        "stage_buffer", "what another import has staged is dropped",
        "  if is_own then\n    redis.call('UNLINK', staged)\n  end\n",
        "  redis.call('UNLINK', staged)\n",
        EXPORT,
    ),
    _damage(
        "stage_buffer", "what was left by a killed import comes first",
        "  redis.call('LTRIM', staged, -1, -1)\n", "",
        EXPORT,
    ),
    _damage(
        "stage_buffer", "a part may follow another import's",
        "elseif not is_own or", "elseif",
        EXPORT,
    ),
    _damage(
        "stage_buffer", "what a killed import has staged stays for ever",
        "redis.call('PEXPIRE', staged, STAGED_MS)\n", "",
        EXPORT,
    ),
]  # fmt: skip

DAMAGES = [
    *ONCE_LUA,
    *FENCE_AND_LEASE,
    *APPEND,
    *STATUS,
    *CLAIM,
    *CREATE_AND_DELETE,
    *REAPING,
    *READING,
    *TRANSFER,
]
