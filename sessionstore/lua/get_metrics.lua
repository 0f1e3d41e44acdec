-- get_metrics: counts, all of them cardinalities, so that the number of sessions does not matter.
--
-- KEYS    1 sessions  2 types
-- ARGV    1 prefix of all keys  2… the statuses to count
-- Returns all sessions, {count per status in the order asked}, {type, count, type, count, …}
local index = ARGV[1] .. 'sessions:'
local by_status, by_type = {}, {}
for i = 2, #ARGV do
  by_status[#by_status + 1] = redis.call('SCARD', index .. 'status:' .. ARGV[i])
end
for _, type in ipairs(redis.call('SMEMBERS', KEYS[2])) do
  by_type[#by_type + 1] = type
  by_type[#by_type + 1] = redis.call('SCARD', index .. 'type:' .. type)
end
return {redis.call('ZCARD', KEYS[1]), by_status, by_type}
