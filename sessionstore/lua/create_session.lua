-- create_session: store a new session and list it in all its indexes.
--
-- KEYS    1 lane  2 session  3 sessions  4 types  5 activity  6 ended  7 events
--         8 leases  9… its index sets: type, status, service, then task and mcp if it has them
-- ARGV    1 sequence  2 session id  3 prefix of all keys  4 '1' = refuse if the service session
--         is in use  5 status  6 type  7 actor
--         8 how long ended sessions are kept, µs, '' = for ever  9… further hash fields and values
-- Returns ok <creation time, µs>
-- Errors  SESSION_EXISTS  SERVICE_SESSION_IN_USE
-- Event   created deleted
--- @include once, clock, types, are, status, wake, event, removal, expired
local session, sessions, types = KEYS[2], KEYS[3], KEYS[4]
local activity, ended, events, leases = KEYS[5], KEYS[6], KEYS[7], KEYS[8]
local FIRST_INDEX, SERVICE_INDEX = 9, 11
local id, prefix, unique, status, type = ARGV[2], ARGV[3], ARGV[4], ARGV[5], ARGV[6]
local actor, retention_us = ARGV[7], tonumber(ARGV[8])
local FIRST_FIELD = 9
local MOST_CLEARED, MOST_WALKED = 2, 20   -- ended sessions, with each new one

must_be('zset', sessions, activity, ended, leases)
must_be('stream', events)
must_be('set', types, unpack(KEYS, FIRST_INDEX))
if redis.call('EXISTS', session) == 1 then
  return refuse('SESSION_EXISTS', {session_id = id})
end
if unique == '1' then
  for _, live in ipairs({'starting', 'active', 'busy'}) do
    local holder = redis.call('SINTER', KEYS[SERVICE_INDEX], prefix .. 'sessions:status:' .. live)[1]
    if holder then
      local owner = redis.call('HGET', prefix .. 'session:' .. holder, 'owner')
      return refuse('SERVICE_SESSION_IN_USE',
        {session_id = holder, status = live, owner = owner or nil})
    end
  end
end
local cleared = retention_us and expired(prefix, retention_us, MOST_CLEARED, MOST_WALKED) or {}

-- Strictly growing, so that it is an order and a place to go on from.
local newest = redis.call('ZRANGE', sessions, -1, -1, 'WITHSCORES')
local created_us = math.max(now_us, newest[2] and tonumber(newest[2]) + 1 or 0)
local created_at = iso(created_us)

redis.call('HSET', session, 'id', id, 'type', type, 'status', status,
  'created_at', created_at, 'last_activity', created_at, unpack(ARGV, FIRST_FIELD))
redis.call('ZADD', sessions, integer(created_us), id)
redis.call('SADD', types, type)
for i = FIRST_INDEX, #KEYS do
  redis.call('SADD', KEYS[i], id)
end
redis.call('ZADD', ENDED[status] and ended or activity, integer(created_us), id)
event(events, 'created', id, type, actor, 'status', status)
for _, one in ipairs(cleared) do
  remove(prefix, one.id, one.removal, actor)
end
return done(integer(created_us))
