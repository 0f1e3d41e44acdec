-- renew: let leases of one worker last from now on.
--
-- KEYS    1 lane  2 leases  3… the sessions
-- ARGV    1 sequence  then for each session  its id  its lease's token  how long it lasts, ms
-- Returns ok <JSON: for each session how many of its worker's entries this server has lost, or what
--         is known of it now that the lease is>
--- @include once, clock, types, are, known
local leases = KEYS[2]
local FIRST_SESSION, FIRST_LEASE = 3, 2

-- What was found of each session; nil for one that is no hash any more.
local found = {}
must_be('zset', leases)
for i = FIRST_SESSION, #KEYS do
  found[i] = are('hash', KEYS[i]) and redis.call('HMGET', KEYS[i],
    'owner', 'fence', 'status', 'output_total', 'error_total')
end

run_at_full_memory()
local now_ms = math.floor(now_us / 1000)
local answers = {}
for i = FIRST_SESSION, #KEYS do
  local at = FIRST_LEASE + 3 * (i - FIRST_SESSION)
  local id, token, ttl_ms = ARGV[at], ARGV[at + 1], tonumber(ARGV[at + 2])
  local owner, fence, status, output_total, error_total = unpack(found[i] or {}, 1, 5)
  local own, lost = read_token(token, output_total, error_total)
  if owner and fence == own then
    redis.call('HDEL', KEYS[i], 'reap_seen_ms')
    redis.call('HSET', KEYS[i], 'lease_expires_at', iso((now_ms + ttl_ms) * 1000))
    redis.call('ZADD', leases, integer(now_ms + ttl_ms), id)
    answers[#answers + 1] = lost
  else
    answers[#answers + 1] = {session_id = id, status = status or nil, owner = owner or nil}
  end
end
return done(cjson.encode(answers))
