-- find_sessions: a page of the sessions that match, without loading those that do not.
--
-- The smallest index of the filters is taken whole if it has at most MOST_WALKED members;
-- otherwise all sessions are walked in order, A_PAGE candidates at a time, and the index sets are
-- probed. Either way a page goes on from a place in the order, so pages may differ in it.
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
local MOST_WALKED = 500
local A_PAGE = 500

local function last_active(id)
  return tonumber(redis.call('ZSCORE', activity, id) or redis.call('ZSCORE', ended, id) or nil)
end

local function score_of(id)
  if by_creation then
    return tonumber(redis.call('ZSCORE', sessions, id) or nil)
  end
  return last_active(id)
end

local function pairs_of(flat)
  local list = {}
  for i = 1, #flat, 2 do
    list[#list + 1] = {id = flat[i], score = tonumber(flat[i + 1]), text = flat[i + 1]}
  end
  return list
end

-- The members of an index set that are in the order. Asking for the score of each takes twice as
-- long: 3 ms for 1,000 on a busy machine.
local function scored(set)
  local found = {}
  for _, ordered in ipairs(by_creation and {sessions} or {activity, ended}) do
    local flat = redis.call('ZINTER', 2, set, ordered, 'WEIGHTS', 0, 1, 'WITHSCORES')
    for _, candidate in ipairs(pairs_of(flat)) do
      found[#found + 1] = candidate
    end
  end
  return found
end

-- A filter has size(), holds(id), and members(): ids with their scores, some perhaps twice.
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
    members = function()
      local found = {}
      for _, set in ipairs(sets) do
        for _, candidate in ipairs(scored(set)) do
          found[#found + 1] = candidate
        end
      end
      return found
    end,
    holds = function(id)
      for _, set in ipairs(sets) do
        if redis.call('SISMEMBER', set, id) == 1 then return true end
      end
      return false
    end,
  }
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
      for i, id in ipairs(ids) do
        ids[i] = {id = id, score = score_of(id)}
      end
      return ids
    end,
    holds = function(id)
      local last = last_active(id)
      return last ~= nil and last <= idle_until
    end,
  }
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
  local candidates, known, are_sorted = {}, {}, true
  for _, candidate in ipairs(index.members()) do
    if candidate.score and not known[candidate.id] and (not seen or before(seen, candidate)) then
      are_sorted = are_sorted and (#candidates == 0 or before(candidates[#candidates], candidate))
      candidates[#candidates + 1], known[candidate.id] = candidate, true
    end
  end
  if not are_sorted then
    table.sort(candidates, before)
  end
  return candidates, false
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

-- How many candidates to walk at once; the last one seen may be among them again.
local walked = by_creation and A_PAGE or math.ceil(A_PAGE / 2)   -- in activity and in ended
walked = #filters == 0 and math.max(1, math.min(most_rows, walked)) or walked
walked = seen and walked + 1 or walked

-- Sessions that were created together have their own microsecond each; imported ones need not.
local function from_creation_order()
  return next_of('ZRANGEBYSCORE', sessions, '-inf', '+inf', walked)
end

-- Two sorted sets in one order: good down to where the first of them was cut off.
local function from_activity_order()
  local live, more_live = next_of('ZREVRANGEBYSCORE', activity, '+inf', '-inf', walked)
  local over, more_over = next_of('ZREVRANGEBYSCORE', ended, '+inf', '-inf', walked)
  local candidates, i, j = {}, 1, 1
  while (live[i] or not more_live) and (over[j] or not more_over) and (live[i] or over[j]) do
    if not over[j] or live[i] and before(live[i], over[j]) then
      candidates[#candidates + 1], i = live[i], i + 1
    else
      candidates[#candidates + 1], j = over[j], j + 1
    end
  end
  return candidates, more_live or more_over
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
