-- drift: three ways to count the sessions, all of them by cardinalities.
--
-- KEYS    1 sessions  2 types  3 activity  4 ended
-- ARGV    1 prefix of all keys  2… the statuses
-- Returns all sessions; the sum over the statuses; the sum over the types; those that are live and
--         those that have ended
--- @include are
local index = ARGV[1] .. 'sessions:'

local function count(command, type, key)
  return are(type, key) and redis.call(command, key) or 0
end

local by_status, by_type = 0, 0
for i = 2, #ARGV do
  by_status = by_status + count('SCARD', 'set', index .. 'status:' .. ARGV[i])
end
for _, type in ipairs(are('set', KEYS[2]) and redis.call('SMEMBERS', KEYS[2]) or {}) do
  by_type = by_type + count('SCARD', 'set', index .. 'type:' .. type)
end
return {count('ZCARD', 'zset', KEYS[1]), by_status, by_type,
  count('ZCARD', 'zset', KEYS[3]) + count('ZCARD', 'zset', KEYS[4])}
