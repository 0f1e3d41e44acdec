-- check_indexes: which members of small indexes are not of a session that says so.
--
-- KEYS    1 sessions, only to say which partition is asked
-- ARGV    1 prefix of all keys  2 most members to look at  3… the keys without prefix
-- Returns how many of the keys were looked at; those that are too large; {key, id, id, …} for each
--         key with members to examine
--- @include names, layout
local prefix, most = ARGV[1], tonumber(ARGV[2])
local FIRST_KEY = 3
local SMALL = 200

local looked_at, large, told, members = 0, {}, {}, 0
for i = FIRST_KEY, #ARGV do
  if members >= most then break end
  local rest = exact(ARGV[i])
  local key, expected = prefix .. rest, expected_type(rest)
  looked_at = looked_at + 1
  if expected == 'list' then
    local id = owner_of_buffer(rest)
    members = members + 1
    if type_of(prefix .. 'session:' .. id) ~= 'hash' then
      told[#told + 1] = {ARGV[i], plain(id)}
    end
  elseif type_of(key) == expected then
    local size = redis.call(expected == 'zset' and 'ZCARD' or 'SCARD', key)
    if size > SMALL then
      large[#large + 1] = ARGV[i]
    else
      members = members + size
      local found = doubtful_members(prefix, rest,
        expected == 'zset' and redis.call('ZRANGE', key, 0, -1) or redis.call('SMEMBERS', key), 1)
      if #found > 0 then
        told[#told + 1] = {ARGV[i], unpack(found)}
      end
    end
  end
end
return {looked_at, large, told}
