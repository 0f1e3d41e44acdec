-- pieces: a large buffer is weighed from its newest entry back, piece by piece.
--
-- Entries never change and their positions count from the beginning of the session, so what was
-- weighed stays true. The last piece reaches the oldest entry, adds what was appended meanwhile, and
-- is compared with the hash in the same script.

-- The next piece. Returns the position it reaches back to and the weight so far; at the end also
-- what the whole buffer weighs now, or 'again' if entries that were weighed are gone already.
local function weigh_piece(session, list, buffer, from, to, weight, room)
  if type_of(session) ~= 'hash' or type_of(list) ~= 'list' then
    return 0, 0, 0, 'gone'
  end
  local length, total = redis.call('LLEN', list), redis.call('HGET', session, buffer .. '_total')
  total = whole_number(total or '0')
  if not total or total < length then
    return 0, 0, 0, 'gone'
  end
  local oldest = total - length
  if not from then
    from, to = total, total
  elseif from < oldest then
    return total, total, 0, 'again'
  end
  local appended = 0
  local bytes, reached = weigh(list, 0, from - oldest - 1, room)
  if reached == 0 and room.entries > 0 then
    local back
    appended, back = weigh(list, to - oldest, length - 1, room)
    if back == to - oldest then
      return oldest, to, weight + bytes, weight + bytes + appended
    end
    return oldest, to, weight + bytes, nil
  end
  return oldest + reached, to, weight + bytes, nil
end
