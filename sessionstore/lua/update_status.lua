-- update_status: move a session from its status to another; any but busy ends its lease.
--
-- KEYS    1 lane  2 session  3 activity  4 ended  5 leases  6 events
--         7 index set of the new status
-- ARGV    1 sequence  2 session id  3 prefix of all keys  4 fence  5 actor  6 new status
--         7… the statuses it may have now; none = any
-- Returns ok
-- Errors  SESSION_NOT_FOUND  LEASE_LOST  WRITES_LOST  SESSION_BUSY  SESSION_STATUS
-- Event   status_changed released
--- @include once, clock, types, status, wake, move, lease, known, fence, event
local session, activity, ended, leases, events = KEYS[2], KEYS[3], KEYS[4], KEYS[5], KEYS[6]
local new_index = KEYS[7]
local id, prefix, given, actor, new = ARGV[2], ARGV[3], ARGV[4], ARGV[5], ARGV[6]
local FIRST_EXPECTED = 7

local stored = redis.call('HMGET', session, 'status', 'type', unpack(FENCE_FIELDS))
local old, type, owner = unpack(stored, 1, 3)
if not old then
  return refuse('SESSION_NOT_FOUND', {session_id = id})
end
local refused = fenced_off(given, id, old, unpack(stored, 3, 7))
if refused then
  return refused
end
local expected = #ARGV < FIRST_EXPECTED
for i = FIRST_EXPECTED, #ARGV do
  expected = expected or ARGV[i] == old
end
if not expected then
  return refuse('SESSION_STATUS', {session_id = id, status = old})
end
must_be('zset', activity, leases, ENDED[old] ~= ENDED[new] and ended or nil)
must_be('set', prefix .. 'sessions:status:' .. old, new_index)
must_be('stream', events)
local released = owner and (new ~= 'busy' or given == 'force')
if released then
  must_be('set', prefix .. 'sessions:owner:' .. owner)
end

move(prefix, id, old, new)
redis.call('HSET', session, 'status', new, 'last_activity', iso(now_us))
if released then
  end_lease(prefix, id, owner)
  event(events, 'released', id, type, actor, 'old_status', old, 'status', new, 'owner', owner)
elseif old ~= new then
  event(events, 'status_changed', id, type, actor, 'old_status', old, 'status', new)
end
return done()
