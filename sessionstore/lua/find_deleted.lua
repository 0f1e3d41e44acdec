-- find_deleted: how many entries a buffer had when its session was deleted, by the events.
--
-- KEYS    1 events
-- ARGV    1 session id  2 the field of the event with the number of entries
--         3 walk back from this stream id, '+' = from the newest event
-- Returns that number, nil if it was not found here; the stream id to walk on from, nil at the end
local events, id, field, from = KEYS[1], ARGV[1], ARGV[2], ARGV[3]
local MOST_WALKED = 500

local walked = redis.call('XREVRANGE', events, from, '-', 'COUNT', MOST_WALKED)
for _, entry in ipairs(walked) do
  local fields = {}
  for i = 1, #entry[2], 2 do
    fields[entry[2][i]] = entry[2][i + 1]
  end
  if fields.event == 'deleted' and fields.session_id == id then
    return {fields[field] or '0'}
  end
end
return {false, #walked == MOST_WALKED and '(' .. walked[#walked][1] or false}
