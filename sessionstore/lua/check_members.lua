-- check_members: a page of a large index: which members are not of a session that says so.
--
-- KEYS    1 sessions, only to say which partition is asked
-- ARGV    1 prefix of all keys  2 the index without prefix  3 cursor, '0' at first
--         4 how many members to look at, roughly
-- Returns cursor, '0' at the end; the ids to examine
--- @include names, layout
local prefix, rest, cursor, count = ARGV[1], exact(ARGV[2]), ARGV[3], ARGV[4]
local key, kind = prefix .. rest, type_of(prefix .. rest)
if kind ~= 'set' and kind ~= 'zset' then
  return {'0', {}}
end
local page = redis.call(kind == 'zset' and 'ZSCAN' or 'SSCAN', key, cursor, 'COUNT', count)
return {page[1], doubtful_members(prefix, rest, page[2], kind == 'zset' and 2 or 1)}
