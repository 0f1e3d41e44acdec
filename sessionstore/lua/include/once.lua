-- once: a write runs once, however often it is sent.
--
-- KEYS[1] is the lane, ARGV[1] the sequence number of this write in its lane. The lane key holds
-- the last write of the lane as "<sequence> <answer>":
--   the same sequence   this is a repeat: give the stored answer, change nothing
--   a higher one        a late duplicate, overtaken by its own repeat: change nothing
--   a lower one, none   go on, and finish with done() or refuse()
-- Refusals are stored too: a delayed first attempt must not run after its caller was told "no".
local LANE_MS = 600000   -- a lane remembers its last write for so long at least, twice at most
local lane, sequence = KEYS[1], ARGV[1]
local last = redis.call('GET', lane)
if last then
  local last_sequence, answer = string.match(last, '^(%d+) (.*)$')
  if last_sequence == sequence then
    redis.call('PEXPIRE', lane, 2 * LANE_MS)
    return answer
  elseif tonumber(last_sequence) > tonumber(sequence) then
    return 'LATE_DUPLICATE {}'
  end
end

-- The last command of a write. To set an expiry costs three times the SET itself, so it is renewed
-- only when it must be.
local function remember(answer)
  if redis.call('PTTL', lane) >= LANE_MS then
    redis.call('SET', lane, sequence .. ' ' .. answer, 'KEEPTTL')
  else
    redis.call('SET', lane, sequence .. ' ' .. answer, 'PX', 2 * LANE_MS)
  end
  return answer
end

-- The end of a write that was carried out.
local function done(result)
  return remember(result and ('ok ' .. result) or 'ok')
end

-- Redis checks its memory limit at a script's first write only, and never for DEL. A script that
-- begins with this runs at full memory too.
local function run_at_full_memory()
  redis.call('DEL', lane)
end

-- The only writes of a write that is refused. `code` is the Python error's code.
local function refuse(code, details)
  run_at_full_memory()
  return remember(code .. ' ' .. cjson.encode(details))
end
