-- clock: the server's time, the only clock that all workers share.
local time = redis.call('TIME')
local now_us = tonumber(time[1]) * 1000000 + tonumber(time[2])

-- Lua would print a number this large as 1.7953e+15.
local function integer(number)
  return string.format('%.0f', number)
end

-- Microseconds since 1970 as ISO 8601 in UTC. Days to a date as in Howard Hinnant's
-- "chrono-Compatible Low-Level Date Algorithms" (civil_from_days): Redis's Lua has no os.date.
local function iso(us)
  local floor = math.floor
  local seconds = floor(us / 1000000)
  local z = floor(seconds / 86400) + 719468
  local era = floor(z / 146097)
  local day_of_era = z - era * 146097
  local year_of_era = floor((day_of_era - floor(day_of_era / 1460)
    + floor(day_of_era / 36524) - floor(day_of_era / 146096)) / 365)
  local day_of_year = day_of_era
    - (365 * year_of_era + floor(year_of_era / 4) - floor(year_of_era / 100))
  local shifted_month = floor((5 * day_of_year + 2) / 153)
  local day = day_of_year - floor((153 * shifted_month + 2) / 5) + 1
  local month = shifted_month + (shifted_month < 10 and 3 or -9)
  local year = year_of_era + era * 400 + (month <= 2 and 1 or 0)
  local second = seconds % 86400
  return string.format('%04d-%02d-%02dT%02d:%02d:%02d.%06dZ', year, month, day,
    floor(second / 3600), floor(second / 60) % 60, second % 60, us - seconds * 1000000)
end
