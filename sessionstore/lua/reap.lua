-- reap: end what is dead: sessions whose worker is lost, idle ones, ended ones past their time.
--
-- A lease that has expired is marked with the server's time. A later pass ends the session if the
-- mark is one to three grace periods old; an older one is renewed, for while nobody passed, nobody
-- may have been able to renew either. A worker that renews takes the mark away.
--
-- Only the heads of leases, activity and ended are looked at, MOST_WALKED of each. The head of
-- activity may be full of sessions that are quiet and held, so the next pass goes on where this
-- one stopped.
--
-- KEYS    1 lane  2 sessions  3 types  4 activity  5 ended  6 leases  7 events
--         8 where in activity to go on, a string "<score> <id>"
-- ARGV    1 sequence  2 prefix of all keys  3 actor  4 grace period, ms
--         5 idle for at least this many µs, '' = leave idle ones alone
--         6 ended for at least this many µs, '' = leave ended ones alone
--         7 most sessions of each kind  8 '1' = only tell
--         9 most entries and 10 most bytes an error buffer keeps, 0 = no bound
-- Returns ok <JSON: for each session what is done with it and why>
-- Event   lease_expired status_changed deleted
--- @include once, clock, types, are, status, wake, event, move, lease, removal, expired
local activity, ended, leases, events, place = KEYS[4], KEYS[5], KEYS[6], KEYS[7], KEYS[8]
local prefix, actor, grace_ms = ARGV[2], ARGV[3], tonumber(ARGV[4])
local idle_us, ended_us = tonumber(ARGV[5]), tonumber(ARGV[6])
local most, only_tell = tonumber(ARGV[7]), ARGV[8] == '1'
local most_entries, most_bytes = tonumber(ARGV[9]), tonumber(ARGV[10])
local MOST_WALKED = 1000
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

local marked, lost = 0, 0
for _, id in ipairs(redis.call('ZRANGEBYSCORE', leases, '-inf', integer(now_ms), 'LIMIT', 0, MOST_WALKED)) do
  local found = load(id)
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
      lost = lost + 1
      lose(id, found)
      tell(id, 'lost', details)
    end
  end
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

if idle_us then
  local from, last = '-inf', nil
  local stored = are('string', place) and redis.call('GET', place)
  if stored then
    from, last = string.match(stored, '^(%d+) (.*)$')
  end
  local heads = redis.call('ZRANGEBYSCORE', activity, from or '-inf', integer(now_us - idle_us),
    'WITHSCORES', 'LIMIT', 0, MOST_WALKED)
  local terminated, stopped = 0, nil
  for i = 1, #heads, 2 do
    local id, score = heads[i], tonumber(heads[i + 1])
    if terminated == most then break end
    stopped = integer(score) .. ' ' .. id
    local found = id ~= last and load(id)
    if found and not found.owner and not ENDED[found.status] then
      terminated = terminated + 1
      if not only_tell then
        redis.call('HSET', found.key, 'status', 'terminated')
        move(prefix, id, found.status, 'terminated')
        event(events, 'status_changed', id, found.type, actor, 'old_status', found.status,
          'status', 'terminated')
      end
      tell(id, 'terminated', {status = found.status, idle_us = now_us - score})
    end
  end
  local cut_off = terminated == most or #heads == 2 * MOST_WALKED
  go_on_at(cut_off and stopped or nil)
end

-- ---- Ended sessions -------------------------------------------------------------------------------

if ended_us then
  for _, one in ipairs(expired(prefix, ended_us, most, MOST_WALKED)) do
    if not only_tell then
      remove(prefix, one.id, one.removal, actor)
    end
    tell(one.id, 'deleted', {status = one.removal.status, ended_us = one.ended_us})
  end
end
return done(#told > 0 and cjson.encode(told) or '[]')
