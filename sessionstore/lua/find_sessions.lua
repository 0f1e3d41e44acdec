-- find_sessions: a page of the sessions that match, without loading those that do not.
--
-- The smallest index of the filters is taken whole if it has at most MOST_WALKED members;
-- otherwise all sessions are walked in order, MOST_WALKED candidates a page, and the index sets
-- are probed. Either way a page goes on from a place in the order, so pages may differ in it.
-- (SSCAN is no substitute: across a restart of the server it missed 5,001 of 20,000 members.)
--
-- KEYS    1 sessions  2 activity  3 ended  4… index sets, filter after filter
-- ARGV    1 prefix of all keys  2 order: 'created' or '-last_activity'
--         3 score and 4 id of the last session seen, both '' for the first page
--         5 most rows  6 most bytes of buffers in all, roughly
--         7 tail: newest entries of each buffer, -1 = all
--         8 idle for at least this many µs, '' = no such filter
--         9… for each filter, how many index sets it has; a match is in one of them
-- Returns TIME; score and id to go on from, '' at the end; the id of a session that is too large
--         for a page and must be read alone, or ''; the rows, each {score, hash fields, output
--         entries, error entries}
--- @include clock, rows
local sessions, activity, ended = KEYS[1], KEYS[2], KEYS[3]
local prefix, by_creation = ARGV[1], ARGV[2] == 'created'
local seen = ARGV[3] ~= '' and {score = tonumber(ARGV[3]), id = ARGV[4]} or nil
local most_rows, most_bytes, tail = tonumber(ARGV[5]), tonumber(ARGV[6]), tonumber(ARGV[7])
local idle_until = ARGV[8] ~= '' and now_us - tonumber(ARGV[8]) or nil
local FIRST_SET, FIRST_FILTER = 4, 9
local MOST_WALKED = 1000

-- A filter has size(), members() and holds(id).
local filters = {}
local next_set = FIRST_SET
for i = FIRST_FILTER, #ARGV do
  local sets = {unpack(KEYS, next_set, next_set + tonumber(ARGV[i]) - 1)}
  next_set = next_set + #sets
  filters[#filters + 1] = {
    size = function()
      local size = 0
      for _, set in ipairs(sets) do size = size + redis.call('SCARD', set) end
      return size
    end,
    members = function() return redis.call('SUNION', unpack(sets)) end,
    holds = function(id)
      for _, set in ipairs(sets) do
        if redis.call('SISMEMBER', set, id) == 1 then return true end
      end
      return false
    end,
  }
end

local function last_active(id)
  return tonumber(redis.call('ZSCORE', activity, id) or redis.call('ZSCORE', ended, id) or nil)
end

if idle_until then
  local bound = integer(idle_until)
  filters[#filters + 1] = {
    size = function()
      return redis.call('ZCOUNT', activity, '-inf', bound)
        + redis.call('ZCOUNT', ended, '-inf', bound)
    end,
    members = function()
      local ids = redis.call('ZRANGEBYSCORE', activity, '-inf', bound)
      for _, id in ipairs(redis.call('ZRANGEBYSCORE', ended, '-inf', bound)) do
        ids[#ids + 1] = id
      end
      return ids
    end,
    holds = function(id)
      local last = last_active(id)
      return last ~= nil and last <= idle_until
    end,
  }
end

local function score_of(id)
  if by_creation then
    return tonumber(redis.call('ZSCORE', sessions, id) or nil)
  end
  return last_active(id)
end

-- Never true of a session and itself: table.sort needs that, and so does going on after `seen`.
local function before(a, b)
  if not by_creation then
    a, b = b, a
  end
  if a.score ~= b.score then
    return a.score < b.score
  end
  return a.id < b.id
end

-- Candidates in order, after the last session seen; and whether more may follow them.
local function from_index(index)
  local candidates = {}
  for _, id in ipairs(index.members()) do
    local candidate = {id = id, score = score_of(id)}
    if candidate.score and (not seen or before(seen, candidate)) then
      candidates[#candidates + 1] = candidate
    end
  end
  table.sort(candidates, before)
  return candidates, false
end

local function pairs_of(flat)
  local list = {}
  for i = 1, #flat, 2 do
    list[#list + 1] = {id = flat[i], score = tonumber(flat[i + 1]), text = flat[i + 1]}
  end
  return list
end

-- The next of a sorted set, as `command` walks it from `first` to `last`; and whether more may
-- follow them.
local function next_of(command, set, first, last, walked)
  local from, offset, following = seen and integer(seen.score) or first, 0, {}
  while true do
    local head = pairs_of(redis.call(command, set, from, last, 'WITHSCORES', 'LIMIT', offset, walked))
    for _, candidate in ipairs(head) do
      if not seen or before(seen, candidate) then
        following[#following + 1] = candidate
      end
    end
    if #head < walked or #following > 0 then
      return following, #head == walked
    end
    offset = offset + walked   -- all of them of the microsecond of `seen`, and before it
  end
end

-- Sessions that were created together have their own microsecond each; imported ones need not.
local function from_creation_order()
  local walked = #filters == 0 and math.max(1, math.min(most_rows, MOST_WALKED)) or MOST_WALKED
  return next_of('ZRANGEBYSCORE', sessions, '-inf', '+inf', seen and walked + 1 or walked)
end

-- Two sorted sets in one order: good down to where the first of them was cut off.
local function from_activity_order()
  local candidates, cut_off = {}, nil
  for _, set in ipairs({activity, ended}) do
    local following, more = next_of('ZREVRANGEBYSCORE', set, '+inf', '-inf', MOST_WALKED)
    for _, candidate in ipairs(following) do
      candidates[#candidates + 1] = candidate
    end
    local last = following[#following]
    if more and (not cut_off or before(last, cut_off)) then
      cut_off = last
    end
  end
  table.sort(candidates, before)
  while cut_off and before(cut_off, candidates[#candidates]) do
    candidates[#candidates] = nil
  end
  return candidates, cut_off ~= nil
end

local smallest, smallest_size = nil, MOST_WALKED + 1
for _, filter in ipairs(filters) do
  local size = filter.size()
  if size < smallest_size then
    smallest, smallest_size = filter, size
  end
end
local candidates, more
if smallest then
  candidates, more = from_index(smallest)
elseif by_creation then
  candidates, more = from_creation_order()
else
  candidates, more = from_activity_order()
end

local function matches(id)
  for _, filter in ipairs(filters) do
    if filter ~= smallest and not filter.holds(id) then return false end
  end
  return true
end

local rows, room, last, too_large = {}, most_bytes, seen, ''
for _, candidate in ipairs(candidates) do
  if #rows == most_rows or room <= 0 then
    more = true
    break
  end
  if matches(candidate.id) then
    local fields, output, errors, bytes = load_row(prefix, candidate.id, tail, room)
    if fields then
      local score = candidate.text or integer(candidate.score)
      rows[#rows + 1], room = {score, fields, output, errors}, room - bytes
    else
      more = true
      if #rows > 0 then break end
      too_large, last = candidate.id, candidate
      break
    end
  end
  last = candidate
end
if not more or not last then
  return {time, '', '', too_large, rows}
end
return {time, integer(last.score), last.id, too_large, rows}
