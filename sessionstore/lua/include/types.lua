-- types: a command on a key of the wrong type fails in the middle of a script and leaves the
-- writes before it in place. So every key is looked at before the first write.
local PROBE = {set = 'SCARD', zset = 'ZCARD', list = 'LLEN', hash = 'HLEN', stream = 'XLEN'}

-- The probe of a key of another type fails, with Redis's own WRONGTYPE error.
local function must_be(type, ...)
  for _, key in ipairs({...}) do
    redis.call(PROBE[type], key)
  end
end
