-- expired: ended sessions whose time is over.

-- Those that ended at least so long ago, the longest ended first, `most` of them. One of which a key
-- is spoilt is passed over: the doctor's case.
local function expired(prefix, ended_us, most, walked)
  local found = {}
  local heads = redis.call('ZRANGEBYSCORE', prefix .. 'ended', '-inf', integer(now_us - ended_us),
    'WITHSCORES', 'LIMIT', 0, walked)
  for i = 1, #heads, 2 do
    if #found == most then break end
    local id = heads[i]
    local removal = are('hash', prefix .. 'session:' .. id) and removal_of(prefix, id)
    if removal and ENDED[removal.status] and are('set', unpack(removal.sets)) then
      found[#found + 1] = {id = id, removal = removal, ended_us = now_us - tonumber(heads[i + 1])}
    end
  end
  return found
end
