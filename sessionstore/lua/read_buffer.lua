-- read_buffer: a page of a buffer, from an absolute position.
--
-- KEYS    1 session  2 its list of output or errors
-- ARGV    1 cursor: entries since the session began  2 most entries in the page
--         3 the hash field with the entries ever added
--         4 the hash field with the bytes that the list holds
-- Returns status (nil if there is no such session), entries ever added, position of the first
--         entry that is still there, position of the page's first entry, the page's entries
local session, list = KEYS[1], KEYS[2]
local cursor, limit = tonumber(ARGV[1]), tonumber(ARGV[2])
local PAGE_BYTES = 1048576

local status, total, bytes = unpack(redis.call('HMGET', session, 'status', ARGV[3], ARGV[4]), 1, 3)
if not status then
  return {false}
end
total, bytes = tonumber(total or 0), tonumber(bytes or 0)
local length = redis.call('LLEN', list)
local oldest = total - length
local start = math.min(math.max(cursor, oldest), total)

-- A few entries at a time, as many as fit a page on average: one entry may be a megabyte.
local step = math.max(1, math.floor(PAGE_BYTES * length / math.max(bytes, 1)))
local entries, size = {}, 0
while #entries < limit and size < PAGE_BYTES do
  local from = start - oldest + #entries
  local to = from + math.min(step, limit - #entries) - 1
  local slice = redis.call('LRANGE', list, from, to)
  if #slice == 0 then break end
  for _, entry in ipairs(slice) do
    if #entries > 0 and size + #entry > PAGE_BYTES then
      size = PAGE_BYTES
      break
    end
    entries[#entries + 1], size = entry, size + #entry
  end
end
return {status, total, oldest, start, entries}
