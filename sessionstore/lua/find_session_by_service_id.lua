-- find_session_by_service_id: the earliest created session of a service session.
--
-- KEYS    1 index set of the service session  2 sessions
-- ARGV    1 prefix of all keys  2 '1' = only sessions that have not ended
--         3 tail: newest entries of each buffer, -1 = all  4 most bytes of buffers, roughly
-- Returns TIME, its id, its row {hash fields, output entries, error entries}: without an id there
--         is none, without a row it is too large and must be read alone; only TIME if the service
--         session has so many sessions that they must be listed page by page
--- @include status, rows
local index, sessions = KEYS[1], KEYS[2]
local prefix, live, tail, room = ARGV[1], ARGV[2] == '1', tonumber(ARGV[3]), tonumber(ARGV[4])
local MOST_WALKED = 1000
local time = redis.call('TIME')

if redis.call('SCARD', index) > MOST_WALKED then
  return {time}
end
local earliest, earliest_created
for _, id in ipairs(redis.call('SMEMBERS', index)) do
  local created = tonumber(redis.call('ZSCORE', sessions, id) or nil)
  if created and (not earliest or created < earliest_created)
    and not (live and ENDED[redis.call('HGET', prefix .. 'session:' .. id, 'status')]) then
    earliest, earliest_created = id, created
  end
end
if not earliest then
  return {time, ''}
end
local fields, output, errors = load_row(prefix, earliest, tail, room)
return {time, earliest, fields and {fields, output, errors} or nil}
