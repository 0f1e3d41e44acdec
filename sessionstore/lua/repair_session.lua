-- repair_session: mend what is wrong with one session, as it is now.
--
-- KEYS    1 lane  2 sessions, only to say which partition is asked
-- ARGV    1 sequence  2 prefix of all keys  3 most entries and 4 most bytes a buffer keeps
--         5 after how long an expired lease is told, µs
--         6 most entries and 7 most bytes of a buffer to weigh
--         8 its id  9… keys without prefix that it was seen in
-- Returns ok <JSON: {kind, key without prefix, detail} of all that was wrong>
--- @include once, clock, status, names, layout, examine
local prefix, overdue_us, id = ARGV[2], tonumber(ARGV[5]), exact(ARGV[8])
local bounds = {entries = tonumber(ARGV[3]), bytes = tonumber(ARGV[4])}
local most_entries, most_bytes = tonumber(ARGV[6]), tonumber(ARGV[7])
local room = {entries = most_entries, bytes = most_bytes, most_entries = most_entries,
  most_bytes = most_bytes}
local FIRST_CANDIDATE = 9

local candidates = {unpack(ALWAYS_EXAMINED)}
for i = FIRST_CANDIDATE, #ARGV do
  candidates[#candidates + 1] = exact(ARGV[i])
end
local findings = examine(prefix, id, candidates, bounds, overdue_us, room, true)
-- Nobody who lists sessions meanwhile may miss one: first it is added, then it is taken away.
for _, commands in ipairs({findings.aside, findings.added, findings.changed, findings.removed}) do
  for _, command in ipairs(commands) do
    redis.call(unpack(command))
  end
end
return done(#findings.told > 0 and cjson.encode(findings.told) or '[]')
