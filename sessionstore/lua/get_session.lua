-- get_session: one session without its buffers. With buffers it is read by a MULTI instead:
-- Lua would copy every entry twice.
--
-- KEYS    1 session
-- Returns the server's time as TIME gives it; the hash fields, none if there is no such session
return {redis.call('TIME'), redis.call('HGETALL', KEYS[1])}
