-- check_sessions: what is wrong with sessions; changes nothing.
--
-- KEYS    1 sessions, only to say which partition is asked
-- ARGV    1 prefix of all keys  2 most entries and 3 most bytes a buffer keeps, 0 = no bound
--         4 after how long an expired lease is told, µs
--         5 most entries and 6 most bytes of buffers to weigh
--         7 '1' = the sessions' hashes are there to be examined, '' = only what is seen elsewhere
--         8… for each session its id, how many keys it was seen in, and these without prefix
-- Returns how many of the sessions were examined; for each of them its service session's id, and
--         {kind, key without prefix, detail} of all that is wrong
--- @include clock, status, names, layout, examine
local prefix, overdue_us, whole = ARGV[1], tonumber(ARGV[4]), ARGV[7] == '1'
local bounds = {entries = tonumber(ARGV[2]), bytes = tonumber(ARGV[3])}
local most_entries, most_bytes = tonumber(ARGV[5]), tonumber(ARGV[6])
local room = {entries = most_entries, bytes = most_bytes, most_entries = most_entries,
  most_bytes = most_bytes}
local NEXT_SESSION = 8
local SEEN_ELSEWHERE = {index_orphan = true, index_stray = true, buffer_orphan = true}

local answers, at = {}, NEXT_SESSION
while ARGV[at] and room.entries > 0 and room.bytes > 0 do
  local id, count = exact(ARGV[at]), tonumber(ARGV[at + 1])
  local candidates = whole and {unpack(ALWAYS_EXAMINED)} or {}
  for i = at + 2, at + 1 + count do
    candidates[#candidates + 1] = exact(ARGV[i])
  end
  at = at + 2 + count
  local findings, service = examine(prefix, id, candidates, bounds, overdue_us, room, whole)
  local told = {}
  for _, finding in ipairs(findings.told) do
    if whole and finding[1] ~= 'index_orphan' or not whole and SEEN_ELSEWHERE[finding[1]] then
      told[#told + 1] = finding
    end
  end
  answers[#answers + 1] = {service and plain(service) or '', told}
end
return {#answers, answers}
