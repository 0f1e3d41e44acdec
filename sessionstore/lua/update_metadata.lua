-- update_metadata: set and remove the caller's own fields of a session.
--
-- KEYS    1 lane  2 session
-- ARGV    1 sequence  2 session id  3 most names a session may have  4 how many names to set
--         5… the hash fields and values to set, then the hash fields to remove
-- Returns ok
-- Errors  SESSION_NOT_FOUND  METADATA_LIMIT
--- @include once
local session = KEYS[2]
local id, most_names, to_set = ARGV[2], tonumber(ARGV[3]), tonumber(ARGV[4])
local FIRST_FIELD = 5
local first_removed = FIRST_FIELD + 2 * to_set

local fields = redis.call('HKEYS', session)
if #fields == 0 then
  return refuse('SESSION_NOT_FOUND', {session_id = id})
end
local names, count = {}, 0
for _, field in ipairs(fields) do
  if string.sub(field, 1, 5) == 'meta:' then
    names[field], count = true, count + 1
  end
end
for i = FIRST_FIELD, first_removed - 1, 2 do
  count = count + (names[ARGV[i]] and 0 or 1)
end
for i = first_removed, #ARGV do
  count = count - (names[ARGV[i]] and 1 or 0)
end
if to_set > 0 and count > most_names then
  return refuse('METADATA_LIMIT', {session_id = id, limit = most_names})
end

if to_set > 0 then
  redis.call('HSET', session, unpack(ARGV, FIRST_FIELD, first_removed - 1))
end
if first_removed <= #ARGV then
  redis.call('HDEL', session, unpack(ARGV, first_removed))
end
return done()
