-- rows: sessions as rows of a page.

-- What the newest `tail` entries of a list weigh, by its average entry. -1 means all of them.
local function expected_bytes(list, bytes, tail)
  local length = tail < 0 and 0 or redis.call('LLEN', list)
  return length > tail and bytes * tail / length or bytes
end

-- {hash fields, output entries, error entries} and what they weigh; nil if that is over `room`.
local function load_row(prefix, id, tail, room)
  local session = prefix .. 'session:' .. id
  local fields = redis.call('HGETALL', session)
  if tail == 0 then
    return {fields, {}, {}}, 0
  end
  local output, errors = session .. ':output', session .. ':errors'
  local stored = redis.call('HMGET', session, 'output_bytes', 'error_bytes')
  local bytes = expected_bytes(output, tonumber(stored[1] or 0), tail)
    + expected_bytes(errors, tonumber(stored[2] or 0), tail)
  if bytes > room then
    return nil, bytes
  end
  local first = tail < 0 and 0 or -tail
  return {fields, redis.call('LRANGE', output, first, -1),
    redis.call('LRANGE', errors, first, -1)}, bytes
end
