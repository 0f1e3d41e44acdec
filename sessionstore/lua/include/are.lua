-- are: whether keys have a type, for scripts that pass over what is spoilt instead of failing.
local function are(type, ...)
  for _, key in ipairs({...}) do
    local found = redis.call('TYPE', key).ok
    if found ~= type and found ~= 'none' then
      return false
    end
  end
  return true
end
