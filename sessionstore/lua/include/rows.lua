-- rows: sessions as rows of a page.

-- What the newest `tail` entries of a list weigh, by its average entry. -1 means all of them.
local function expected_bytes(list, bytes, tail)
  if tail < 0 then
    return bytes
  end
  local length = redis.call('LLEN', list)
  return length > tail and bytes * tail / length or bytes
end

local ENTRY_OVERHEAD = 16   -- as in append.lua: an entry weighs more than its text

local function bytes_of(entries)
  local bytes = ENTRY_OVERHEAD * #entries
  for _, entry in ipairs(entries) do
    bytes = bytes + #entry
  end
  return bytes
end

local function read_row(session, tail, room)
  local fields = redis.call('HGETALL', session)
  if tail == 0 then
    return {fields, {}, {}}, 0
  end
  local output, errors = session .. ':output', session .. ':errors'
  local stored = redis.call('HMGET', session, 'output_bytes', 'error_bytes')
  local expected = expected_bytes(output, tonumber(stored[1] or 0) or 0, tail)
    + expected_bytes(errors, tonumber(stored[2] or 0) or 0, tail)
  if expected > room then
    return nil, expected
  end
  local first = tail < 0 and 0 or -tail
  local newest, newest_errors = redis.call('LRANGE', output, first, -1),
    redis.call('LRANGE', errors, first, -1)
  return {fields, newest, newest_errors}, bytes_of(newest) + bytes_of(newest_errors)
end

-- {hash fields, output entries, error entries} and the bytes of the entries; nil if they are
-- expected to be over `room`. A session of which a key has the wrong type gives no fields but its
-- id: it is unreadable, and the others are listed all the same.
local function load_row(prefix, id, tail, room)
  local ok, row, bytes = pcall(read_row, prefix .. 'session:' .. id, tail, room)
  if not ok then
    return {{'id', id}, {}, {}}, 0
  end
  return row, bytes
end
