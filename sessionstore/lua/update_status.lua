-- update_status: move a session from its status to another.
--
-- KEYS    1 lane  2 session  3 activity  4 ended  5 events  6 index set of the new status
-- ARGV    1 sequence  2 session id  3 prefix of all keys  4 new status
--         5… the statuses it may have now; none = any
-- Returns ok
-- Errors  SESSION_NOT_FOUND  SESSION_STATUS
-- Event   status_changed
--- @include once, clock, types, status, event
local session, activity, ended, events, new_index = KEYS[2], KEYS[3], KEYS[4], KEYS[5], KEYS[6]
local id, prefix, new = ARGV[2], ARGV[3], ARGV[4]
local FIRST_EXPECTED = 5

local stored = redis.call('HMGET', session, 'status', 'type')
local old, type = stored[1], stored[2]
if not old then
  return refuse('SESSION_NOT_FOUND', {session_id = id})
end
local expected = #ARGV < FIRST_EXPECTED
for i = FIRST_EXPECTED, #ARGV do
  expected = expected or ARGV[i] == old
end
if not expected then
  return refuse('SESSION_STATUS', {session_id = id, status = old})
end
local old_index = prefix .. 'sessions:status:' .. old
must_be('zset', activity, ended)
must_be('set', old_index, new_index)
must_be('stream', events)

run_at_full_memory()
redis.call('HSET', session, 'status', new, 'last_activity', iso(now_us))
if ENDED[new] then
  redis.call('ZREM', activity, id)
  if not ENDED[old] then
    redis.call('ZADD', ended, integer(now_us), id)
  end
else
  redis.call('ZREM', ended, id)
  redis.call('ZADD', activity, integer(now_us), id)
end
if old ~= new then
  redis.call('SREM', old_index, id)
  redis.call('SADD', new_index, id)
  event(events, 'status_changed', id, type or '', 'old_status', old, 'status', new)
end
return done()
