-- read_events: lifecycle events after a position in the stream.
--
-- KEYS    1 events
-- ARGV    1 the stream id of the last event seen, '' = where the stream ends now
--         2 most events
-- Returns for '': the id of the newest event, or 0-0
--         else '1' if events after the position may have been trimmed away, for the one at it has
--         been, or ''; the events as XRANGE gives them
local events, seen, most = KEYS[1], ARGV[1], ARGV[2]

if seen == '' then
  local newest = redis.call('XREVRANGE', events, '+', '-', 'COUNT', 1)[1]
  return newest and newest[1] or '0-0'
end
local following = redis.call('XRANGE', events, '(' .. seen, '+', 'COUNT', most)
local gap = #following > 0 and seen ~= '0-0' and #redis.call('XRANGE', events, seen, seen) == 0
return {gap and '1' or '', following}
