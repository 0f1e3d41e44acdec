-- reap: end what is dead: sessions whose worker is lost, idle ones, ended ones past their time.
--
-- A lease that has expired is marked with the server's time. A later pass ends the session if the
-- mark is one to three grace periods old; an older one is renewed, for while nobody passed, nobody
-- may have been able to renew either. A worker that renews takes the mark away.
--
-- Only the heads of leases, activity and ended are looked at, in this order, MOST_WALKED of each.
-- The head of activity may be full of sessions that are quiet and held, so the next pass goes on
-- where this one stopped.
--
-- One script does only so much, 2 to 4 ms, and tells where the next one of the pass is to begin.
--
-- KEYS    1 lane  2 sessions  3 types  4 activity  5 ended  6 leases  7 events
--         8 where in activity to go on, a string "<score> <id>"
-- ARGV    1 sequence  2 prefix of all keys  3 actor  4 grace period, ms
--         5 idle for at least this many µs, '' = leave idle ones alone
--         6 ended for at least this many µs, '' = leave ended ones alone
--         7 most sessions of each kind  8 '1' = only tell
--         9 most entries and 10 most bytes an error buffer keeps, 0 = no bound
--         11… where to begin, nothing in the first script of a pass: the kind of heads, 1 to 3;
--         how many of them were looked at; how many of these are still there; how many sessions
--         were marked, terminated or deleted; how many were lost; where in activity it began
-- Returns ok <JSON: told, for each session what is done with it and why; next, where the next
--         script is to begin, null at the end>
-- Event   lease_expired status_changed deleted
--- @include once, clock, types, are, status, wake, event, move, lease, removal, expired
local activity, ended, leases, events, place = KEYS[4], KEYS[5], KEYS[6], KEYS[7], KEYS[8]
local prefix, actor, grace_ms = ARGV[2], ARGV[3], tonumber(ARGV[4])
local idle_us, ended_us = tonumber(ARGV[5]), tonumber(ARGV[6])
local most, only_tell = tonumber(ARGV[7]), ARGV[8] == '1'
local most_entries, most_bytes = tonumber(ARGV[9]), tonumber(ARGV[10])
local LEASES, IDLE, ENDED_ONES = 1, 2, 3
local kind = tonumber(ARGV[11] or LEASES)
local walked, offset = tonumber(ARGV[12] or 0), tonumber(ARGV[13] or 0)
local done_before, lost_before = tonumber(ARGV[14] or 0), tonumber(ARGV[15] or 0)
local began_at = ARGV[16]
local MOST_WALKED = 1000
local MOST_WORK = 100        -- in one script; to look at a session is 1, about 20 µs
local WORK_OF_AN_END = 2     -- and that much more to end it
local STATUSES = {starting = true, active = true, busy = true, error = true, terminated = true}
local ENTRY_OVERHEAD = 16   -- as in append.lua: an entry weighs more than its text

must_be('zset', KEYS[2], activity, ended, leases)
must_be('set', KEYS[3])
must_be('stream', events)
local now, now_ms = iso(now_us), math.floor(now_us / 1000)
if not only_tell then
  run_at_full_memory()
end

local told = {}
local function tell(id, action, details)
  details.session_id, details.action = id, action
  told[#told + 1] = details
end

-- How much was done, and how many more of a kind may be looked at.
local work = 0
local function room()
  return math.max(0, math.min(MOST_WORK - work, MOST_WALKED - walked))
end

-- A session was looked at; is it still at the head?
local function looked_at(is_there)
  walked, work = walked + 1, work + 1
  if is_there or only_tell then
    offset = offset + 1
  else
    work = work + WORK_OF_AN_END
  end
end

-- The next kind of heads begins.
local function next_kind(following)
  kind, walked, offset, done_before, lost_before, began_at = following, 0, 0, 0, 0, nil
end

-- The end of this script; with more to do unless all kinds are done.
local function tell_all(done_of_kind, lost)
  local following = kind <= ENDED_ONES
    and cjson.encode({kind, walked, offset, done_of_kind, lost or 0, began_at or ''}) or 'null'
  local all = #told > 0 and cjson.encode(told) or '[]'
  return done('{"told":' .. all .. ',"next":' .. following .. '}')
end

-- A session's fields; nil if a key that ending it would touch is spoilt: the doctor's case.
local function load(id)
  local session = prefix .. 'session:' .. id
  if not are('hash', session) or not are('list', session .. ':errors') then
    return nil
  end
  local status, type, owner, expires_at, seen_ms = unpack(redis.call('HMGET', session,
    'status', 'type', 'owner', 'lease_expires_at', 'reap_seen_ms'), 1, 5)
  local indexes = prefix .. 'sessions:'
  if not STATUSES[status] or not are('set', indexes .. 'status:' .. status, indexes .. 'status:error',
      indexes .. 'status:terminated', indexes .. 'owner:' .. (owner or '')) then
    return nil
  end
  return {key = session, status = status, type = type, owner = owner,
    expires_at = expires_at or nil,
    seen_ms = tonumber(seen_ms or nil)}
end

local function add_error(session, line)
  local list, stored = session .. ':errors', redis.call('HMGET', session, 'error_total', 'error_bytes')
  local bytes = (tonumber(stored[2] or nil) or 0) + #line + ENTRY_OVERHEAD
  local length = redis.call('RPUSH', list, line)
  local trimmed = 0
  while trimmed < MOST_WALKED and length > 1 and ((most_entries > 0 and length > most_entries)
      or (most_bytes > 0 and bytes > most_bytes)) do
    bytes = bytes - #redis.call('LPOP', list) - ENTRY_OVERHEAD
    length, trimmed = length - 1, trimmed + 1
  end
  redis.call('HSET', session, 'error_total', integer((tonumber(stored[1] or nil) or 0) + 1),
    'error_bytes', integer(bytes))
end

-- ---- Lost workers ---------------------------------------------------------------------------------

local function lose(id, found)
  if only_tell then
    return
  end
  redis.call('HSET', found.key, 'status', 'error')
  move(prefix, id, found.status, 'error')
  end_lease(prefix, id, found.owner)
  add_error(found.key, 'worker ' .. found.owner .. ' was lost: its lease expired at '
    .. (found.expires_at or 'an unknown time') .. '; ended by ' .. actor)
  event(events, 'lease_expired', id, found.type, actor, 'owner', found.owner,
    'old_status', found.status, 'status', 'error')
end

if kind == LEASES then
  local marked, lost, asked = done_before, lost_before, room()
  local heads = redis.call('ZRANGEBYSCORE', leases, '-inf', integer(now_ms), 'LIMIT', offset, asked)
  for _, id in ipairs(heads) do
    if work >= MOST_WORK then
      return tell_all(marked, lost)
    end
    local found, is_there = load(id), true
    if found and found.owner and not is_live(found.owner, found.expires_at, now) then
      local age_ms = found.seen_ms and now_ms - found.seen_ms
      local details = {status = found.status, owner = found.owner,
        expired_at = found.expires_at or 'an unknown time'}
      if not age_ms or age_ms < 0 or age_ms > 3 * grace_ms then
        if marked < most then
          marked = marked + 1
          if not only_tell then
            redis.call('HSET', found.key, 'reap_seen_ms', integer(now_ms))
          end
          tell(id, 'marked', details)
        end
      elseif age_ms >= grace_ms and lost < most then
        lost, is_there = lost + 1, false
        lose(id, found)
        tell(id, 'lost', details)
      end
    end
    looked_at(is_there)
  end
  if #heads == asked and walked < MOST_WALKED then
    return tell_all(marked, lost)
  end
  next_kind(IDLE)
end

-- ---- Idle sessions --------------------------------------------------------------------------------

local function go_on_at(candidate)
  if only_tell then
    return
  elseif candidate then
    redis.call('SET', place, candidate)
  else
    redis.call('DEL', place)
  end
end

if kind == IDLE and idle_us then
  began_at = began_at or are('string', place) and redis.call('GET', place) or ''
  local from, last = string.match(began_at, '^(%d+) (.*)$')
  local terminated, asked, stopped = done_before, room(), nil
  local heads = redis.call('ZRANGEBYSCORE', activity, from or '-inf', integer(now_us - idle_us),
    'WITHSCORES', 'LIMIT', offset, asked)
  for i = 1, #heads, 2 do
    local id, score = heads[i], tonumber(heads[i + 1])
    if terminated == most then break end
    if work >= MOST_WORK then
      return tell_all(terminated)
    end
    stopped = integer(score) .. ' ' .. id
    local found, is_there = id ~= last and load(id), true
    if found and not found.owner and not ENDED[found.status] then
      terminated, is_there = terminated + 1, false
      if not only_tell then
        redis.call('HSET', found.key, 'status', 'terminated')
        move(prefix, id, found.status, 'terminated')
        event(events, 'status_changed', id, found.type, actor, 'old_status', found.status,
          'status', 'terminated')
      end
      tell(id, 'terminated', {status = found.status, idle_us = now_us - score})
    end
    looked_at(is_there)
  end
  local cut_off = terminated == most or walked == MOST_WALKED
  if #heads == 2 * asked and not cut_off then
    return tell_all(terminated)
  end
  go_on_at(cut_off and stopped or nil)
end
if kind == IDLE then
  next_kind(ENDED_ONES)
end

-- ---- Ended sessions -------------------------------------------------------------------------------

if ended_us then
  local ends = math.ceil((MOST_WORK - work) / (1 + WORK_OF_AN_END))
  local most_now = math.max(0, math.min(most - done_before, ends))
  local found, count, no_more = expired(prefix, ended_us, most_now, room(), offset)
  for _, one in ipairs(found) do
    if not only_tell then
      remove(prefix, one.id, one.removal, actor)
    end
    tell(one.id, 'deleted', {status = one.removal.status, ended_us = one.ended_us})
  end
  walked, offset = walked + count, offset + count - (only_tell and 0 or #found)
  local deleted = done_before + #found
  if not no_more and deleted < most and walked < MOST_WALKED then
    return tell_all(deleted)
  end
end
kind = ENDED_ONES + 1
return tell_all(0)
