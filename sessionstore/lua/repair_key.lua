-- repair_key: mend a key that is wrong for itself: its type, its expiry, a type no session has.
--
-- KEYS    1 lane  2 a key of the same partition, only to say which
-- ARGV    1 sequence  2 prefix of all keys  3 the key without prefix
--         4 of types: the type that no session may have, else ''
-- Returns ok <JSON: {kind, key without prefix, detail} of all that was wrong>
--- @include once, names, layout
local prefix, rest, member = ARGV[2], exact(ARGV[3]), exact(ARGV[4])
local key, kind, expected = prefix .. rest, type_of(prefix .. rest), expected_type(rest)
local told = {}

local function tell(what, detail)
  told[#told + 1] = {what, plain(rest), plain(detail)}
end

run_at_full_memory()
if kind ~= 'none' and expected and kind ~= expected then
  tell('wrong_type', kind)
  local name = free_quarantine(prefix, rest)
  redis.call('RENAME', key, name)
  redis.call('PERSIST', name)
elseif kind ~= 'none' and expected then
  local expires = redis.call('PTTL', key) >= 0
  local is_lane = string.find(rest, '^lane:') ~= nil
  if is_lane and not expires then
    tell('lane_lasting', '')
    redis.call('PEXPIRE', key, 2 * LANE_MS)
  elseif expires and not is_lane then
    tell('expiry', '')
    redis.call('PERSIST', key)
  end
  if member ~= '' and redis.call('EXISTS', prefix .. 'sessions:type:' .. member) == 0
    and redis.call('SREM', key, member) == 1 then
    tell('index_orphan', member)
  end
end
return done(#told > 0 and cjson.encode(told) or '[]')
