-- append: what add_output and add_error share; their headers name KEYS and ARGV.
local session, list, activity = KEYS[2], KEYS[3], KEYS[4]
local id, most_entries, most_bytes = ARGV[2], tonumber(ARGV[3]), tonumber(ARGV[4])
local given = ARGV[5]
local FIRST_CHUNK = 6
local ENTRY_OVERHEAD = 16   -- bytes counted for each entry beside its text
local MORE_TRIMMED = 1000   -- one append trims at most what it added and this many entries
local SLICE = 4000          -- Lua's unpack fails somewhere above 5,000 values

-- How many of the oldest entries must go until `bytes` fits; and the bytes that then remain.
-- Reads a few entries at a time: an entry may be a megabyte.
local function entries_over(bytes, length, most_trimmed)
  local gone = 0
  while bytes > most_bytes and gone < most_trimmed do
    local average = math.max(1, bytes / (length - gone))
    local wanted = math.min(math.ceil((bytes - most_bytes) / average), 128, most_trimmed - gone)
    for _, entry in ipairs(redis.call('LRANGE', list, gone, gone + wanted - 1)) do
      if bytes <= most_bytes then break end
      bytes = bytes - #entry - ENTRY_OVERHEAD
      gone = gone + 1
    end
  end
  return gone, bytes
end

local function append(buffer)
  local total_field, bytes_field = buffer .. '_total', buffer .. '_bytes'
  local stored = redis.call('HMGET', session, 'status', total_field, bytes_field,
    unpack(FENCE_FIELDS))
  local status, owner = stored[1], stored[4]
  if not status then
    return refuse('SESSION_NOT_FOUND', {session_id = id})
  end
  local refused = (owner or given ~= '') and fenced_off(given, id, status, unpack(stored, 4, 8))
  if refused then
    return refused
  end
  redis.call('LLEN', list)   -- fails here, before the first write, if it is no list
  local added = #ARGV - FIRST_CHUNK + 1
  local total = integer(tonumber(stored[2] or 0) + added)
  local bytes = tonumber(stored[3] or 0) + added * ENTRY_OVERHEAD
  for i = FIRST_CHUNK, #ARGV do
    bytes = bytes + #ARGV[i]
  end

  if not ENDED[status] then
    redis.call('ZADD', activity, integer(now_us), id)
  end
  local length
  for first = FIRST_CHUNK, #ARGV, SLICE do
    length = redis.call('RPUSH', list, unpack(ARGV, first, math.min(first + SLICE - 1, #ARGV)))
  end

  -- The newest entry always stays.
  local most_trimmed = math.min(added + MORE_TRIMMED, length - 1)
  local trimmed = 0
  if most_entries > 0 and length > most_entries then
    trimmed = math.min(length - most_entries, most_trimmed)
    for _, entry in ipairs(redis.call('LPOP', list, trimmed)) do
      bytes = bytes - #entry - ENTRY_OVERHEAD
    end
  end
  if most_bytes > 0 and bytes > most_bytes then
    local gone
    gone, bytes = entries_over(bytes, length - trimmed, most_trimmed - trimmed)
    redis.call('LTRIM', list, gone, -1)
  end

  redis.call('HSET', session, 'last_activity', iso(now_us),
    total_field, total, bytes_field, integer(bytes))
  wake(list, total)
  return done(total)
end
