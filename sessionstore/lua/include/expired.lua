-- expired: ended sessions whose time is over.

-- Those that ended at least so long ago, the longest ended first, `most` of them, from `walked` heads
-- after `offset`. One of which a key is spoilt is passed over: the doctor's case. And how many heads
-- were looked at, and whether there are no more.
local function expired(prefix, ended_us, most, walked, offset)
  local found, looked_at = {}, 0
  local heads = redis.call('ZRANGEBYSCORE', prefix .. 'ended', '-inf', integer(now_us - ended_us),
    'WITHSCORES', 'LIMIT', offset or 0, walked)
  for i = 1, #heads, 2 do
    if #found == most then break end
    local id = heads[i]
    local removal = are('hash', prefix .. 'session:' .. id) and removal_of(prefix, id)
    if removal and ENDED[removal.status] and are('set', unpack(removal.sets)) then
      found[#found + 1] = {id = id, removal = removal, ended_us = now_us - tonumber(heads[i + 1])}
    end
    looked_at = looked_at + 1
  end
  return found, looked_at, #heads < 2 * walked and 2 * looked_at == #heads
end
