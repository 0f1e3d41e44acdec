-- check_server: the layout of a namespace, and what the server tells of itself.
--
-- KEYS    1 meta
-- ARGV    1… sections of INFO
-- Returns the type of meta; its fields and values; for each section its text, '' if it is denied
--- @include names
local kind = redis.call('TYPE', KEYS[1]).ok
local flat, meta, sections = kind == 'hash' and redis.call('HGETALL', KEYS[1]) or {}, {}, {}
for i = 1, #flat do
  meta[i] = plain(flat[i])
end
for i = 1, #ARGV do
  local text = redis.pcall('INFO', ARGV[i])
  sections[i] = text.err and '' or plain(text)
end
return {kind, meta, sections}
