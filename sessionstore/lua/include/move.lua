-- move: a session from one status to another, in every index of statuses.
local function move(prefix, id, old, new)
  local activity, ended = prefix .. 'activity', prefix .. 'ended'
  if ENDED[new] then
    redis.call('ZREM', activity, id)
    if not ENDED[old] then
      redis.call('ZADD', ended, integer(now_us), id)
    end
  else
    redis.call('ZREM', ended, id)
    redis.call('ZADD', activity, integer(now_us), id)
  end
  if old ~= new then
    redis.call('SREM', prefix .. 'sessions:status:' .. old, id)
    redis.call('SADD', prefix .. 'sessions:status:' .. new, id)
  end
end
