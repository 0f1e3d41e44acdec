-- read_whole: a session with its buffers, for when MULTI is refused: at full memory Redis 7.0
-- does that even to commands that only read.
--
-- KEYS    1 session  2 output  3 errors
-- ARGV    1 index of the first entry of each buffer
-- Returns TIME, hash fields, output, errors: what the MULTI would
local first = ARGV[1]
return {redis.call('TIME'), redis.call('HGETALL', KEYS[1]),
  redis.call('LRANGE', KEYS[2], first, -1), redis.call('LRANGE', KEYS[3], first, -1)}
