-- layout: which keys a partition has, of what type, and which sessions belong in an index.
local SETS = {'type', 'status', 'service', 'task', 'mcp', 'owner'}
local FIELD_OF = {type = 'type', status = 'status', service = 'service_session_id',
  task = 'task_id', mcp = 'mcp_session_id', owner = 'owner'}
local FIXED = {sessions = 'zset', activity = 'zset', ended = 'zset', leases = 'zset', types = 'set',
  events = 'stream', reaping = 'string', meta = 'hash'}
local STATUSES = {'starting', 'active', 'busy', 'error', 'terminated'}
local IS_STATUS = {starting = true, active = true, busy = true, error = true, terminated = true}

-- A key's type, as it is before the script's first write: many sessions share their indexes.
local types_seen = {}
local function type_of(key)
  local found = types_seen[key]
  if not found then
    found = redis.call('TYPE', key).ok
    types_seen[key] = found
  end
  return found
end

-- The index and the value of sessions:<index>:<value>; nil for other keys.
local function split_index(rest)
  local index, value = string.match(rest, '^sessions:(%l+):(.+)$')
  if index and FIELD_OF[index] then
    return index, value
  end
end

-- The id of the session that a buffer is of; nil for other keys.
local function owner_of_buffer(rest)
  local id, buffer = string.match(rest, '^session:([^:]+):(%l+)$')
  return (buffer == 'output' or buffer == 'errors') and id or nil
end

-- What a key must be, by its name without prefix; nil if no key has such a name.
local function expected_type(rest)
  local family = string.match(rest, '^(%l+):.')
  if not family then
    return FIXED[rest]
  elseif family == 'sessions' then
    return split_index(rest) and 'set' or nil
  elseif family == 'session' then
    return not string.find(rest, ':', 9, true) and 'hash' or owner_of_buffer(rest) and 'list' or nil
  end
  return family == 'lane' and 'string' or nil
end

-- Where a key is set aside that nothing else can be done with.
local function free_quarantine(prefix, rest)
  local name, number = prefix .. 'quarantine:' .. rest, 1
  local free = name
  while redis.call('EXISTS', free) == 1 do
    number = number + 1
    free = name .. '#' .. number
  end
  return free
end

-- Keys of which each session is looked for when it is examined, whatever its hash says.
local ALWAYS_EXAMINED = {'activity', 'ended', 'leases'}
for _, status in ipairs(STATUSES) do
  ALWAYS_EXAMINED[#ALWAYS_EXAMINED + 1] = 'sessions:status:' .. status
end

-- Whether an index may well have a session in it. `field` and `value` are what the session's hash
-- must say, nil for an index for which each session is looked for anyway: a hash is then enough.
local function belongs(prefix, id, field, value)
  local session = prefix .. 'session:' .. id
  if string.find(id, ':', 1, true) or type_of(session) ~= 'hash' then
    return false
  end
  return not field or redis.call('HGET', session, field) == value
end

-- Of the members of an index those that may not belong in it.
local function doubtful_members(prefix, rest, members, step)
  local index, value = split_index(rest)
  local field = index and index ~= 'status' and FIELD_OF[index] or nil
  local found = {}
  for i = 1, #members, step do
    local member = members[i]
    local fits
    if rest == 'types' then
      fits = redis.call('EXISTS', prefix .. 'sessions:type:' .. member) == 1
    else
      fits = belongs(prefix, member, field, value)
    end
    if not fits then
      found[#found + 1] = plain(member)
    end
  end
  return found
end
