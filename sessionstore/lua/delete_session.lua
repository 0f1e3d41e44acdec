-- delete_session: remove a session, its buffers, and its id from every index.
--
-- KEYS    1 lane  2 session  3 output  4 errors  5 sessions  6 activity  7 ended  8 leases
--         9 types  10 events
-- ARGV    1 sequence  2 session id  3 prefix of all keys  4 fence  5 actor
-- Returns ok 1, or ok 0 if there was no such session
-- Errors  LEASE_LOST  WRITES_LOST  SESSION_BUSY
-- Event   deleted
--- @include once, clock, types, lease, known, fence, wake, event, removal
local session, sessions, activity, ended = KEYS[2], KEYS[5], KEYS[6], KEYS[7]
local leases, types, events = KEYS[8], KEYS[9], KEYS[10]
local id, prefix, given, actor = ARGV[2], ARGV[3], ARGV[4], ARGV[5]

if redis.call('EXISTS', session) == 0 then
  run_at_full_memory()
  return done('0')
end
local removal = removal_of(prefix, id)
local refused = fenced_off(given, id, removal.status or nil,
  unpack(redis.call('HMGET', session, unpack(FENCE_FIELDS)), 1, 5))
if refused then
  return refused
end
must_be('set', types, unpack(removal.sets))
must_be('zset', sessions, activity, ended, leases)
must_be('stream', events)

run_at_full_memory()
remove(prefix, id, removal, actor)
return done('1')
