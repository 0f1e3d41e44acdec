-- claim: give a session to one worker for a time.
--
-- KEYS    1 lane  2 session  3 activity  4 ended  5 leases  6 events  7 index set of busy
--         8 index set of the worker's sessions
-- ARGV    1 sequence  2 session id  3 prefix of all keys  4 worker  5 how long the lease lasts, ms
--         6… the statuses it may have now, unless a lease on it has expired
-- Returns ok <fence> <entries ever added to output> <and to errors> <status it had>
-- Errors  SESSION_NOT_FOUND  SESSION_BUSY  SESSION_NOT_ACTIVE
-- Event   lease_expired claimed
--- @include once, clock, types, status, wake, move, lease, known, event
local session, activity, ended, leases, events = KEYS[2], KEYS[3], KEYS[4], KEYS[5], KEYS[6]
local busy_index, new_owner_index = KEYS[7], KEYS[8]
local id, prefix, worker, ttl_ms = ARGV[2], ARGV[3], ARGV[4], tonumber(ARGV[5])
local FIRST_EXPECTED = 6

local stored = redis.call('HMGET', session, 'status', 'type', 'output_total', 'error_total',
  unpack(LEASE_FIELDS))
local old, type, output_total, error_total, owner, fence, expires_at = unpack(stored, 1, 7)
if not old then
  return refuse('SESSION_NOT_FOUND', {session_id = id})
end
local now = iso(now_us)
if is_live(owner, expires_at, now) then
  return refuse('SESSION_BUSY', held(id, old, owner, expires_at, now))
end
local expected = owner
for i = FIRST_EXPECTED, #ARGV do
  expected = expected or ARGV[i] == old
end
if not expected then
  return refuse('SESSION_NOT_ACTIVE', {session_id = id, status = old})
end
must_be('zset', activity, leases, ENDED[old] and ended or nil)
must_be('set', prefix .. 'sessions:status:' .. old, busy_index, new_owner_index)
must_be('stream', events)
if owner then
  must_be('set', prefix .. 'sessions:owner:' .. owner)
end

-- It grows with the clock too: a failover may lose the last claim, and with it the last fence.
local now_ms = math.floor(now_us / 1000)
local new_fence = integer(math.max((tonumber(fence) or 0) + 1, now_ms))
move(prefix, id, old, 'busy')
if owner then
  end_lease(prefix, id, owner)
  event(events, 'lease_expired', id, type, worker, 'owner', owner)
end
redis.call('HSET', session, 'status', 'busy', 'last_activity', now, 'owner', worker,
  'fence', new_fence, 'lease_expires_at', iso((now_ms + ttl_ms) * 1000))
redis.call('ZADD', leases, integer(now_ms + ttl_ms), id)
redis.call('SADD', new_owner_index, id)
event(events, 'claimed', id, type, worker, 'old_status', old, 'status', 'busy', 'owner', worker)
local known = {integer(count_of(output_total)), integer(count_of(error_total))}
return done(table.concat({new_fence, known[1], known[2], old}, ' '))
