-- repair_buffer: weigh the last piece of a large buffer, and put right what the hash says.
--
-- KEYS    1 lane  2 session  3 its list
-- ARGV    1 sequence  2 'output' or 'error'  3 from and 4 to which position was weighed
--         5 weight so far  6 most entries and 7 most bytes to weigh
-- Returns ok <what the hash said, in plain text>, ok same, or ok again
--- @include once, clock, status, names, layout, examine, pieces
local session, list, buffer = KEYS[2], KEYS[3], ARGV[2]
local room = {entries = tonumber(ARGV[6]), bytes = tonumber(ARGV[7])}
local _, _, _, verdict = weigh_piece(session, list, buffer, tonumber(ARGV[3]), tonumber(ARGV[4]),
  tonumber(ARGV[5]), room)
if not verdict or verdict == 'again' then
  return done('again')
elseif verdict == 'gone' then
  return done('same')
end
local field = buffer .. '_bytes'
local said = redis.call('HGET', session, field)
if whole_number(said or '0') == verdict then
  return done('same')
end
redis.call('HSET', session, field, integer(verdict))
return done('was ' .. plain(said or 'none'))
