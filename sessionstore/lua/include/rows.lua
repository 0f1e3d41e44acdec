-- rows: sessions as rows of a page.

local ENTRY_OVERHEAD = 400   -- what an entry costs the server in a page, in bytes: 1 µs

-- What the newest `tail` entries of a list weigh in a page, by its average entry; -1 means all.
local function expected_bytes(list, bytes, tail)
  local length = redis.call('LLEN', list)
  local wanted = tail < 0 and length or math.min(length, tail)
  return wanted > 0 and wanted * (bytes / length + ENTRY_OVERHEAD) or 0
end

local function bytes_of(entries)
  local bytes = ENTRY_OVERHEAD * #entries
  for _, entry in ipairs(entries) do
    bytes = bytes + #entry
  end
  return bytes
end

local NO_ENTRIES = {}
local FEW_FIELDS = 28   -- names and values of a session with hardly any metadata

local function read_buffers(session, tail, room)
  local output, errors = session .. ':output', session .. ':errors'
  local stored = redis.call('HMGET', session, 'output_bytes', 'error_bytes')
  local expected = expected_bytes(output, tonumber(stored[1] or 0) or 0, tail)
    + expected_bytes(errors, tonumber(stored[2] or 0) or 0, tail)
  if expected > room then
    return nil
  end
  local first = tail < 0 and 0 or -tail
  return redis.call('LRANGE', output, first, -1), redis.call('LRANGE', errors, first, -1)
end

-- A session's hash fields, output entries and error entries, and what they weigh; nil if its
-- buffers are expected to be over `room`. A session of which a key has the wrong type gives no
-- fields but its id: it is unreadable, and the others are listed all the same.
local function load_row(prefix, id, tail, room)
  local session = prefix .. 'session:' .. id
  local fields = redis.pcall('HGETALL', session)
  if fields.err then
    return {'id', id}, NO_ENTRIES, NO_ENTRIES, 0
  end
  local bytes = #fields > FEW_FIELDS and bytes_of(fields) or 0
  if tail == 0 then
    return fields, NO_ENTRIES, NO_ENTRIES, bytes
  end
  local ok, output, errors = pcall(read_buffers, session, tail, room)
  if not ok then
    return {'id', id}, NO_ENTRIES, NO_ENTRIES, 0
  elseif not output then
    return nil
  end
  return fields, output, errors, bytes + bytes_of(output) + bytes_of(errors)
end
