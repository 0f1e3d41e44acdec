-- open_store: what layout this namespace has; a new namespace gets this version's.
--
-- KEYS    1 meta
-- ARGV    1… the fields and values of a new namespace
-- Returns the hash fields; none if the namespace is new and its user may not lay it out
local meta = redis.call('HGETALL', KEYS[1])
if #meta == 0 then
  local laid_out = redis.pcall('HSET', KEYS[1], unpack(ARGV))
  if type(laid_out) == 'number' then
    return ARGV
  end
  -- Redis 6.2 and 7.0; later ones, and Valkey.
  local denied = string.find(laid_out.err, 'user executing the script', 1, true)
    or string.find(laid_out.err, 'ACL failure', 1, true)
  return denied and meta or laid_out
end
return meta
