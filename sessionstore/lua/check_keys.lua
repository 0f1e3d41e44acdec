-- check_keys: a page of the keys of a namespace, and what is wrong with each key for itself.
--
-- KEYS    1 any key of the namespace, only to say which server is asked
-- ARGV    1 cursor, '0' at first  2 pattern  3 how many keys to look at, roughly
--         4 '1' = only hashes of sessions
-- Returns cursor, '0' at the end; {prefix, key without it, its type, '' or what is wrong} for each
--         key that something is to be done with
--- @include names, layout
local cursor, pattern, count, only_sessions = ARGV[1], ARGV[2], ARGV[3], ARGV[4] == '1'

local function wrong_with(key, rest, kind, expected)
  if string.find(rest, '^quarantine:') then
    return ''
  elseif string.find(rest, '^import:') and redis.call('PTTL', key) >= 0 then
    return ''   -- what an import has staged goes by itself
  elseif not expected then
    return 'unknown_key'
  elseif kind ~= expected then
    return 'wrong_type'
  end
  local expires = redis.call('PTTL', key) >= 0
  if string.find(rest, '^lane:') then
    return expires and '' or 'lane_lasting'
  end
  return expires and 'expiry' or ''
end

-- The last prefix: mostly it is that of the next key too.
local last, last_plain
local function plain_prefix(prefix)
  if prefix ~= last then
    last, last_plain = prefix, plain(prefix)
  end
  return last_plain
end

local page = redis.call('SCAN', cursor, 'MATCH', pattern, 'COUNT', count)
local told = {}
for _, key in ipairs(page[2]) do
  local prefix, rest = string.match(key, '^({[^}]*}:)(.*)$')
  local expected = rest and expected_type(rest)
  if rest and (not only_sessions or expected == 'hash' and rest ~= 'meta') then
    local kind = redis.call('TYPE', key).ok
    local wrong = only_sessions and '' or wrong_with(key, rest, kind, expected)
    local concerns = expected == 'set' or expected == 'zset' or expected == 'list'
    if kind ~= 'none' and (only_sessions or wrong ~= '' or concerns) then
      told[#told + 1] = {plain_prefix(prefix), plain(rest), kind, wrong}
    end
  end
end
return {page[1], told}
