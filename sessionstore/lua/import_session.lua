-- import_session: store a session that was exported, with its buffers, in one step.
--
-- A lease is not carried over as a live one. Of a session that was held the owner is kept, with a
-- lease that has expired and the next fence: as after its worker's death, anybody may claim it, and
-- what that worker still sends does not fit.
--
-- KEYS    1 lane  2 session  3 output  4 errors  5 staged output  6 staged errors  7 sessions
--         8 types  9 activity  10 ended  11 leases  12 events
--         13… its index sets, owner's included
-- ARGV    1 sequence  2 session id  3 prefix of all keys  4 '1' = replace a session that is there
--         5 actor  6 type  7 status  8 creation time, µs  9 last activity or when it ended, µs
--         10 '1' = it has an owner  11 fence, '' = none  12 expiry of its lease, ms, '' = none
--         13 token  14 and 15 entries staged of output and errors, '' = not staged
--         16 how many hash fields and values follow  17 how many entries of output follow them
--         18… hash fields and values, then further entries of output, then of errors
-- Returns ok
-- Errors  SESSION_EXISTS  LEASE_LOST  WRITES_LOST  SESSION_BUSY  IMPORT_CONFLICT
-- Event   deleted imported
--- @include once, clock, types, status, lease, known, fence, wake, event, removal
local session, output, errors, staged_output, staged_errors = unpack(KEYS, 2, 6)
local sessions, types, activity, ended, leases, events = unpack(KEYS, 7, 12)
local FIRST_INDEX = 13
local id, prefix, replace, actor, type, status = ARGV[2], ARGV[3], ARGV[4], ARGV[5], ARGV[6], ARGV[7]
local created_us, active_us = ARGV[8], ARGV[9]
local owned, fence, expires_ms = ARGV[10] == '1', tonumber(ARGV[11]), tonumber(ARGV[12])
local token = ARGV[13]
local FIRST_FIELD = 18
local first_output = FIRST_FIELD + tonumber(ARGV[16])
local first_error = first_output + tonumber(ARGV[17])
local SLICE = 4000   -- Lua's unpack fails somewhere above 5,000 values

local removal
if redis.call('EXISTS', session) == 1 then
  if replace ~= '1' then
    return refuse('SESSION_EXISTS', {session_id = id})
  end
  local held_by = redis.call('HMGET', session, unpack(LEASE_FIELDS))
  removal = removal_of(prefix, id)
  local refused = fenced_off('', id, removal.status or nil, unpack(held_by, 1, 3))
  if refused then
    return refused
  end
  must_be('set', unpack(removal.sets))
  local fence_here = tonumber(held_by[2] or nil)
  fence = fence_here and math.max(fence or 0, fence_here) or fence
end
for i, staged in ipairs({staged_output, staged_errors}) do
  local count = ARGV[13 + i]
  if count ~= '' and (redis.call('LINDEX', staged, 0) ~= token
      or redis.call('LLEN', staged) ~= tonumber(count) + 1) then
    return refuse('IMPORT_CONFLICT', {session_id = id})
  end
end
must_be('list', output, errors)
must_be('zset', sessions, activity, ended, leases)
must_be('stream', events)
for i = FIRST_INDEX, #KEYS do
  must_be('set', KEYS[i])
end
must_be('set', types)

redis.call('SADD', types, type)   -- first, for it is refused when memory is full
if removal then
  remove(prefix, id, removal, actor)
  redis.call('SADD', types, type)
end

-- Calls `command` with the arguments from `first` to `last`, a slice at a time.
local function in_slices(command, key, first, last)
  for from = first, last, SLICE do
    redis.call(command, key, unpack(ARGV, from, math.min(from + SLICE - 1, last)))
  end
end

in_slices('HSET', session, FIRST_FIELD, first_output - 1)
if fence then
  redis.call('HSET', session, 'fence', integer(owned and fence + 1 or fence))
end
if owned and expires_ms then
  local expired_ms = math.min(expires_ms, math.floor(now_us / 1000))
  redis.call('HSET', session, 'lease_expires_at', iso(expired_ms * 1000))
  redis.call('ZADD', leases, integer(expired_ms), id)
end

local function store(list, staged, count, first, last)
  redis.call('UNLINK', list)
  if count ~= '' then
    redis.call('LPOP', staged)   -- the token
    if count ~= '0' then
      redis.call('RENAME', staged, list)
      redis.call('PERSIST', list)
    end
  end
  in_slices('RPUSH', list, first, last)
end
store(output, staged_output, ARGV[14], first_output, first_error - 1)
store(errors, staged_errors, ARGV[15], first_error, #ARGV)

redis.call('ZADD', sessions, created_us, id)
redis.call('ZADD', ENDED[status] and ended or activity, active_us, id)
for i = FIRST_INDEX, #KEYS do
  redis.call('SADD', KEYS[i], id)
end
event(events, 'imported', id, type, actor, 'status', status)
return done()
