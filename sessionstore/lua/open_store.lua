-- open_store: what layout this namespace has; a new namespace gets this version's.
--
-- KEYS    1 meta
-- ARGV    1… the fields and values of a new namespace
-- Returns the hash fields
local meta = redis.call('HGETALL', KEYS[1])
if #meta == 0 then
  redis.call('HSET', KEYS[1], unpack(ARGV))
  meta = ARGV
end
return meta
