-- names: keys and ids on their way to the doctor and back, in plain ASCII, for others may have put
-- any bytes there.
local function plain(name)
  if not string.find(name, '[^\33-\36\38-\126]') then
    return name
  end
  return (string.gsub(name, '[^\33-\36\38-\126]', function(character)
    return string.format('%%%02X', string.byte(character))
  end))
end

local function exact(name)
  if not string.find(name, '%', 1, true) then
    return name
  end
  return (string.gsub(name, '%%(%x%x)', function(hex) return string.char(tonumber(hex, 16)) end))
end
