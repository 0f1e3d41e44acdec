-- export_sessions: a page of sessions as they are stored, byte for byte, in the order of creation.
--
-- All sessions are walked, and the filters' index sets are probed: MOST_WALKED candidates a page.
-- Buffers over the page's room are not among its rows: they are to be read by read_buffer.
--
-- KEYS    1 sessions  2 activity  3 ended  4… index sets, filter after filter
-- ARGV    1 prefix of all keys
--         2 creation time, µs, and 3 id of the last session seen, both '' for the first page;
--         an id without a time: only that session
--         4 most rows  5 most bytes of fields and buffers in all, roughly
--         6 idle for at least this many µs, '' = no such filter
--         7… for each filter, how many index sets it has; a match is in one of them
-- Returns TIME; creation time and id to go on from, '' at the end; the rows, each {id, its scores in
--         sessions, activity and ended, state, hash fields, length and entries of its output, the
--         same of its errors}. A score that is not there is nil, and so are the entries of both
--         buffers if they are over the room. State: ok, missing (there is no such hash) or spoilt
--         (a key of another type), each of these without what follows.
--- @include clock, are
local sessions, activity, ended = KEYS[1], KEYS[2], KEYS[3]
local prefix, seen_us, seen_id = ARGV[1], tonumber(ARGV[2]), ARGV[3]
local most_rows, room = tonumber(ARGV[4]), tonumber(ARGV[5])
local idle_until = ARGV[6] ~= '' and now_us - tonumber(ARGV[6]) or nil
local FIRST_SET, FIRST_FILTER = 4, 7
local MOST_WALKED = 500
local ENTRY_OVERHEAD = 400   -- what an entry costs the server in a page, in bytes: 1 µs

-- How many candidates to walk at once; the last one seen is among them again.
local walked = (ARGV[FIRST_FILTER] or idle_until) and MOST_WALKED or most_rows
walked = seen_us and walked + 1 or walked

-- Sessions in order after the last one seen, of which several may be of one microsecond; and
-- whether more may follow them.
local function candidates()
  if not seen_us and seen_id ~= '' then
    return {{id = seen_id, score = redis.call('ZSCORE', sessions, seen_id)}}, false
  end
  local from, offset, following = seen_us and integer(seen_us) or '-inf', 0, {}
  while true do
    local head = redis.call('ZRANGEBYSCORE', sessions, from, '+inf', 'WITHSCORES',
      'LIMIT', offset, walked)
    for i = 1, #head, 2 do
      local id, us = head[i], tonumber(head[i + 1])
      if not seen_us or us > seen_us or (us == seen_us and id > seen_id) then
        following[#following + 1] = {id = id, score = head[i + 1]}
      end
    end
    local more = #head == 2 * walked
    if not more or #following > 0 then
      return following, more
    end
    offset = offset + walked
  end
end

local function matches(id)
  local next_set = FIRST_SET
  for i = FIRST_FILTER, #ARGV do
    local found = false
    for _ = 1, tonumber(ARGV[i]) do
      found = found or redis.call('SISMEMBER', KEYS[next_set], id) == 1
      next_set = next_set + 1
    end
    if not found then
      return false
    end
  end
  if idle_until then
    local last = redis.call('ZSCORE', activity, id) or redis.call('ZSCORE', ended, id)
    return last and tonumber(last) <= idle_until
  end
  return true
end

local function weight_of(parts, overhead)
  local bytes = (overhead or 0) * #parts
  for _, part in ipairs(parts) do
    bytes = bytes + #part
  end
  return bytes
end

-- By the hash, and what its entries cost.
local function expected_bytes(stored, length)
  return (tonumber(stored or nil) or 0) + ENTRY_OVERHEAD * length
end

local function load(candidate)
  local id = candidate.id
  local session = prefix .. 'session:' .. id
  local output, errors = session .. ':output', session .. ':errors'
  local row = {id, candidate.score, redis.call('ZSCORE', activity, id),
    redis.call('ZSCORE', ended, id)}
  if not are('hash', session) or not are('list', output, errors) then
    row[5] = 'spoilt'
    return row, weight_of({id})
  end
  local fields = redis.call('HGETALL', session)
  if #fields == 0 then
    row[5] = 'missing'
    return row, weight_of({id})
  end
  row[5], row[6], row[7], row[8], row[9], row[10] = 'ok', fields,
    redis.call('LLEN', output), false, redis.call('LLEN', errors), false
  local stored = redis.call('HMGET', session, 'output_bytes', 'error_bytes')
  local bytes = weight_of(fields)
  if bytes + expected_bytes(stored[1], row[7]) + expected_bytes(stored[2], row[9]) > room then
    return row, bytes, true
  end
  row[8], row[10] = redis.call('LRANGE', output, 0, -1), redis.call('LRANGE', errors, 0, -1)
  return row, bytes + weight_of(row[8], ENTRY_OVERHEAD) + weight_of(row[10], ENTRY_OVERHEAD)
end

local rows, last = {}, nil
local found, more = candidates()
for _, candidate in ipairs(found) do
  if #rows == most_rows or room <= 0 then
    more = true
    break
  end
  if matches(candidate.id) then
    local row, bytes, too_large = load(candidate)
    if too_large and #rows > 0 then   -- there may be room for it in the next page
      more = true
      break
    end
    rows[#rows + 1], room = row, room - bytes
    if too_large then
      room = 0
    end
  end
  last = candidate
end
if not more or not last then
  return {time, '', '', rows}
end
return {time, last.score, last.id, rows}
