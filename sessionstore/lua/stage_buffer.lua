-- stage_buffer: keep a part of a buffer aside until its session is imported, or drop what was kept.
--
-- The staged list begins with the token of its import. So one that was left by an import that was
-- killed, or is another's, is never taken for one's own. It expires an hour after its last part.
--
-- KEYS    1 lane  2 session  3 staged list
-- ARGV    1 sequence  2 session id  3 token
--         4 entries staged so far, '' = begin anew, 'drop' = drop what was kept
--         5 '1' = refuse if there is such a session  6… the entries
-- Returns ok
-- Errors  SESSION_EXISTS  IMPORT_CONFLICT
--- @include once, types
local session, staged = KEYS[2], KEYS[3]
local id, token, so_far, only_new = ARGV[2], ARGV[3], ARGV[4], ARGV[5] == '1'
local FIRST_ENTRY = 6
local SLICE = 4000   -- Lua's unpack fails somewhere above 5,000 values
local STAGED_MS = 3600000

must_be('list', staged)
if only_new and redis.call('EXISTS', session) == 1 then
  return refuse('SESSION_EXISTS', {session_id = id})
end
local is_own = redis.call('LINDEX', staged, 0) == token
if so_far == 'drop' then
  run_at_full_memory()
  if is_own then
    redis.call('UNLINK', staged)
  end
  return done()
end
if so_far == '' then
  redis.call('RPUSH', staged, token)
  redis.call('LTRIM', staged, -1, -1)
elseif not is_own or redis.call('LLEN', staged) ~= tonumber(so_far) + 1 then
  return refuse('IMPORT_CONFLICT', {session_id = id})
end
for first = FIRST_ENTRY, #ARGV, SLICE do
  redis.call('RPUSH', staged, unpack(ARGV, first, math.min(first + SLICE - 1, #ARGV)))
end
redis.call('PEXPIRE', staged, STAGED_MS)
return done()
