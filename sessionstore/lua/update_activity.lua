-- update_activity: mark a session as active now.
--
-- KEYS    1 lane  2 session  3 activity
-- ARGV    1 sequence  2 session id
-- Returns ok
-- Errors  SESSION_NOT_FOUND
--- @include once, clock, status
local session, activity, id = KEYS[2], KEYS[3], ARGV[2]

local status = redis.call('HGET', session, 'status')
if not status then
  return refuse('SESSION_NOT_FOUND', {session_id = id})
end
if not ENDED[status] then
  redis.call('ZADD', activity, integer(now_us), id)   -- fails whole if it is no sorted set
end
redis.call('HSET', session, 'last_activity', iso(now_us))
return done()
