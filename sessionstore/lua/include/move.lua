-- move: a session from one status to another, in every index of statuses.
--
-- Its first write shrinks an index, so that a script that begins with it runs at full memory (see
-- once.lua), and does not pay for run_at_full_memory.
local function move(prefix, id, old, new)
  local activity, ended = prefix .. 'activity', prefix .. 'ended'
  if old == new then
    run_at_full_memory()
  else
    redis.call('SREM', prefix .. 'sessions:status:' .. old, id)
    redis.call('SADD', prefix .. 'sessions:status:' .. new, id)
  end
  if not ENDED[new] then
    redis.call('ZADD', activity, integer(now_us), id)
  end
  if ENDED[old] ~= ENDED[new] then
    if ENDED[new] then
      redis.call('ZREM', activity, id)
      redis.call('ZADD', ended, integer(now_us), id)
      wake_followers(prefix .. 'session:' .. id, 'ended')
    else
      redis.call('ZREM', ended, id)
    end
  end
end
