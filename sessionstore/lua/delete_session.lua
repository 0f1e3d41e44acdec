-- delete_session: remove a session, its buffers, and its id from every index.
--
-- KEYS    1 lane  2 session  3 output  4 errors  5 sessions  6 activity  7 ended  8 leases
--         9 types  10 events
-- ARGV    1 sequence  2 session id  3 prefix of all keys
-- Returns ok 1, or ok 0 if there was no such session
-- Event   deleted
--- @include once, types, event
local session, output, errors, sessions = KEYS[2], KEYS[3], KEYS[4], KEYS[5]
local activity, ended, leases, types, events = KEYS[6], KEYS[7], KEYS[8], KEYS[9], KEYS[10]
local id, index = ARGV[2], ARGV[3] .. 'sessions:'

local stored = redis.call('HMGET', session,
  'type', 'status', 'service_session_id', 'task_id', 'mcp_session_id', 'owner')
local type, status, service, task, mcp, owner = unpack(stored, 1, 6)
if redis.call('EXISTS', session) == 0 then
  run_at_full_memory()
  return done('0')
end
local index_sets = {}
local function listed_in(name, value)
  if value then
    index_sets[#index_sets + 1] = index .. name .. ':' .. value
  end
end
listed_in('type', type)
listed_in('status', status)
listed_in('service', service)
listed_in('task', task)
listed_in('mcp', mcp)
listed_in('owner', owner)
must_be('set', types, unpack(index_sets))
must_be('zset', sessions, activity, ended, leases)
must_be('stream', events)

run_at_full_memory()
redis.call('UNLINK', session, output, errors)
redis.call('ZREM', sessions, id)
redis.call('ZREM', activity, id)
redis.call('ZREM', ended, id)
redis.call('ZREM', leases, id)
for _, set in ipairs(index_sets) do
  redis.call('SREM', set, id)
end
if type and redis.call('EXISTS', index .. 'type:' .. type) == 0 then
  redis.call('SREM', types, type)
end
event(events, 'deleted', id, type or '', 'old_status', status or '')
return done('1')
