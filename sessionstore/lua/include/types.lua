-- types: a command on a key of the wrong type fails in the middle of a script and leaves the
-- writes before it in place. So every key is probed before the first write: the probe itself
-- fails, with Redis's own WRONGTYPE error, while nothing has been changed.
local PROBE = {set = 'SCARD', zset = 'ZCARD', list = 'LLEN', hash = 'HLEN', stream = 'XLEN'}

local function must_be(type, ...)
  for _, key in ipairs({...}) do
    redis.call(PROBE[type], key)
  end
end
