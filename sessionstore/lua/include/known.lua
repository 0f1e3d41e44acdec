-- known: what the holder of a lease tells with its writes and renewals, a token F:O:E. F is its
-- fence; O and E are how many entries of output and of errors the server must have, for so many it
-- has acknowledged. If it has fewer, it has lost some.

-- A buffer's total as stored; 0 for what is none.
local function count_of(total)
  return total and string.match(total, '^%d+$') and tonumber(total) or 0
end

local function missing(expected, total)
  return math.max(tonumber(expected) - count_of(total), 0)
end

-- The fence of a token, and how many acknowledged entries are lost. The totals are as stored.
local function read_token(token, output_total, error_total)
  local fence, output, errors = string.match(token, '^(%d+):(%d+):(%d+)$')
  return fence, fence and missing(output, output_total) + missing(errors, error_total)
end
