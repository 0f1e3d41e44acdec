-- check_buffer: weigh the next piece of a large buffer, and at the end compare with the hash.
--
-- KEYS    1 session  2 its list
-- ARGV    1 'output' or 'error'  2 from and 3 to which position was weighed, '' at first
--         4 weight so far  5 most entries and 6 most bytes to weigh
-- Returns from and to which position was weighed, the weight; '' or the weight at the end, 'again'
--         or 'gone'; the bytes that the hash says
--- @include clock, status, names, layout, examine, pieces
local buffer = ARGV[1]
local room = {entries = tonumber(ARGV[5]), bytes = tonumber(ARGV[6])}
local from, to, weight, verdict = weigh_piece(KEYS[1], KEYS[2], buffer, tonumber(ARGV[2]),
  tonumber(ARGV[3]), tonumber(ARGV[4]), room)
local told = type_of(KEYS[1]) == 'hash' and redis.call('HGET', KEYS[1], buffer .. '_bytes') or '0'
if verdict and verdict ~= 'again' and verdict ~= 'gone' then
  verdict = integer(verdict)
end
return {integer(from), integer(to), integer(weight), verdict or '', plain(told or '0')}
