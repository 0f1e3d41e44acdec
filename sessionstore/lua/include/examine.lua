-- examine: what is wrong with one session, and the commands that mend it.
--
-- Both in one step, from the session as it is at that moment: nothing that was seen earlier decides.
-- The hash is the truth. A field of it that breaks the format is restored if the indexes leave one
-- answer; otherwise it is only told, and nothing that depends on it is taken away.
local ENTRY_OVERHEAD = 16   -- as in append.lua: an entry weighs more than its text
local SLICE_BYTES = 65536   -- read at once from a list, on average

-- A stored time as microseconds since 1970; nil if it is none. Days from a date as in Howard
-- Hinnant's days_from_civil, the inverse of the one in clock.lua.
local function parsed(text)
  local year, month, day, hour, minute, second, us = string.match(text,
    '^(%d%d%d%d)%-(%d%d)%-(%d%d)T(%d%d):(%d%d):(%d%d)%.(%d%d%d%d%d%d)Z$')
  if not year then
    return nil
  end
  local floor = math.floor
  month = tonumber(month)
  local shifted_year = month <= 2 and tonumber(year) - 1 or tonumber(year)
  local era = floor(shifted_year / 400)
  local year_of_era = shifted_year - era * 400
  local day_of_year = floor((153 * (month > 2 and month - 3 or month + 9) + 2) / 5)
    + tonumber(day) - 1
  local days = era * 146097 + year_of_era * 365 + floor(year_of_era / 4) - floor(year_of_era / 100)
    + day_of_year - 719468
  local seconds = ((days * 24 + tonumber(hour)) * 60 + tonumber(minute)) * 60 + tonumber(second)
  local found = seconds * 1000000 + tonumber(us)
  return iso(found) == text and found or nil   -- 30 February is no date
end

local times_seen = {}
local function us_of(text)
  if not text then
    return nil
  end
  local found = times_seen[text]
  if found == nil then
    found = parsed(text) or false
    times_seen[text] = found
  end
  return found or nil
end

-- The time that a score tells; nil if it tells none: others may have set it.
local function time_at(us)
  return us and us > 0 and us < 9e15 and iso(math.floor(us)) or nil
end

local function is_utf8(text)
  if not string.find(text, '[\128-\255]') then
    return true
  elseif string.find(text, '\224[\128-\159]') or string.find(text, '\237[\160-\191]')
    or string.find(text, '\240[\128-\143]') or string.find(text, '\244[\144-\191]') then
    return false   -- written longer than it must be, a surrogate, or beyond Unicode
  end
  local rest = string.gsub(text, '[\240-\244][\128-\191][\128-\191][\128-\191]', ' ')
  rest = string.gsub(rest, '[\224-\239][\128-\191][\128-\191]', ' ')
  rest = string.gsub(rest, '[\194-\223][\128-\191]', ' ')
  return not string.find(rest, '[\128-\255]')
end

local function whole_number(text)
  return text and string.find(text, '^%d+$') and #text < 16 and tonumber(text) or nil
end

local function is_type(text)
  return text and #text <= 32 and string.find(text, '^%l[%l%d_-]*$') ~= nil
end

-- The type in agent_<type>_<uuid>.
local function type_in(id)
  local found = string.match(id, '^agent_(.+)_%x%x%x%x%x%x%x%x%-%x%x%x%x%-%x%x%x%x%-%x%x%x%x%-%x+$')
  return is_type(found) and found or nil
end

-- What the entries from one index of a list to another weigh, at most `room.entries` and roughly
-- `room.bytes` of them, newest first; and the index of the oldest that was weighed.
local function weigh(list, first, last, room)
  local bytes, oldest, step = 0, last + 1, 1
  while oldest > first and room.entries > 0 and room.bytes > 0 do
    local from = math.max(first, oldest - math.min(step, room.entries))
    local slice = redis.call('LRANGE', list, from, oldest - 1)
    local weight = ENTRY_OVERHEAD * #slice
    for _, entry in ipairs(slice) do
      weight = weight + #entry
    end
    room.entries, room.bytes = room.entries - #slice, room.bytes - weight
    bytes, oldest = bytes + weight, from
    step = math.max(1, math.floor(SLICE_BYTES * #slice / math.max(weight, 1)))
    step = math.min(step, 1000)
  end
  return bytes, oldest
end

-- What is found, and the commands that mend it: set keys aside, add, change the hash, take away.
local function new_findings(prefix)
  local findings = {told = {}, aside = {}, added = {}, changed = {}, removed = {}}
  local set_aside = {}

  function findings.tell(kind, rest, detail)
    findings.told[#findings.told + 1] = {kind, plain(rest), plain(detail or '')}
  end

  function findings.set_aside(rest)
    if not set_aside[rest] then
      set_aside[rest] = true
      local name = free_quarantine(prefix, rest)
      findings.aside[#findings.aside + 1] = {'RENAME', prefix .. rest, name}
      findings.aside[#findings.aside + 1] = {'PERSIST', name}
    end
  end

  function findings.add(...)
    findings.added[#findings.added + 1] = {...}
  end

  function findings.change(...)
    findings.changed[#findings.changed + 1] = {...}
  end

  function findings.remove(...)
    findings.removed[#findings.removed + 1] = {...}
  end

  -- Whether a key can be used as what it must be; one of another type is told, and set aside.
  function findings.usable(rest)
    local found = type_of(prefix .. rest)
    if found == 'none' or found == expected_type(rest) then
      return true
    end
    findings.tell('wrong_type', rest, found)
    findings.set_aside(rest)
    return false
  end

  return findings
end

-- A session's fields as they should be, and those that nothing tells.
local function examine_fields(prefix, id, findings)
  local rest, key = 'session:' .. id, prefix .. 'session:' .. id
  local fields, unknown = {}, {}
  local flat = redis.call('HGETALL', key)
  for i = 1, #flat, 2 do
    fields[flat[i]] = flat[i + 1]
  end

  local function settle(field, value)
    if value then
      findings.tell('field_restored', rest, field)
      findings.change('HSET', key, field, value)
      fields[field] = value
    else
      findings.tell('field_unreadable', rest, field)
      unknown[field] = true
    end
  end

  local function score(index)
    if type_of(prefix .. index) == 'zset' then
      return tonumber(redis.call('ZSCORE', prefix .. index, id) or nil)
    end
  end

  if fields.id ~= id then
    settle('id', id)
  end
  if not is_type(fields.type) then
    settle('type', type_in(id))
  end
  if not IS_STATUS[fields.status] then
    local only, count = nil, 0
    for _, status in ipairs(STATUSES) do
      local set = prefix .. 'sessions:status:' .. status
      if type_of(set) == 'set' and redis.call('SISMEMBER', set, id) == 1 then
        only, count = status, count + 1
      end
    end
    settle('status', count == 1 and only or nil)
  end
  for _, field in ipairs({'service_session_id', 'project_path'}) do
    if not fields[field] then
      settle(field, nil)
    end
  end
  if not us_of(fields.created_at) then
    settle('created_at', time_at(score('sessions')))
  end
  local created_us, last_us = us_of(fields.created_at), us_of(fields.last_activity)
  if not last_us then
    local told = time_at(score('activity')) or time_at(score('ended'))
    settle('last_activity', told and iso(math.max(us_of(told), created_us or 0)))
  elseif created_us and last_us < created_us then
    local told = time_at(score('activity'))
    settle('last_activity', iso(math.max(created_us, told and us_of(told) or 0)))
  end
  for i = 1, #flat, 2 do
    local field = flat[i]
    if not (is_utf8(field) and is_utf8(fields[field])) then
      findings.tell('field_unreadable', rest, field)
      unknown[field] = true
    end
  end
  return fields, unknown
end

-- Busy with an owner, an expiry and a fence go together.
local function examine_lease(prefix, id, fields, findings, overdue_us)
  local rest, key = 'session:' .. id, prefix .. 'session:' .. id
  local status, expires_us = fields.status, us_of(fields.lease_expires_at)

  local function change(field, value)
    findings.tell('lease_torn', rest, field)
    findings.change('HSET', key, field, value)
    fields[field] = value
  end

  local function no_lease(field)
    findings.tell('lease_torn', rest, field)
    findings.change('HDEL', key, 'owner', 'lease_expires_at', 'reap_seen_ms')
    fields.owner = nil
  end

  if fields.owner == '' then
    return no_lease('owner')
  elseif not fields.owner then
    if fields.lease_expires_at or fields.reap_seen_ms then
      no_lease(fields.lease_expires_at and 'lease_expires_at' or 'reap_seen_ms')
    end
    return
  elseif not IS_STATUS[status] then
    return
  elseif status ~= 'busy' and (ENDED[status] or not expires_us or expires_us <= now_us) then
    return no_lease('owner')
  elseif status ~= 'busy' then
    change('status', 'busy')   -- its worker lives, and is at work on it
  end
  if not expires_us then
    local expires_ms = type_of(prefix .. 'leases') == 'zset'
      and tonumber(redis.call('ZSCORE', prefix .. 'leases', id) or nil)
    change('lease_expires_at', expires_ms and time_at(math.floor(expires_ms) * 1000)
      or iso(math.floor(now_us / 1000) * 1000))
  elseif expires_us < now_us - overdue_us then
    findings.tell('lease_overdue', rest, fields.owner)
  end
  if not whole_number(fields.fence) then
    change('fence', integer(math.floor(now_us / 1000)))
  end
end

-- What the indexes lack; the set of those that the session must be in.
local function examine_indexes(prefix, id, fields, unknown, findings)
  local wanted = {}
  for _, index in ipairs(SETS) do
    local value = not unknown[FIELD_OF[index]] and fields[FIELD_OF[index]]
    if value and value ~= '' then
      local rest = 'sessions:' .. index .. ':' .. value
      wanted[rest] = true
      if not findings.usable(rest) then
        findings.add('SADD', prefix .. rest, id)
      elseif redis.call('SISMEMBER', prefix .. rest, id) == 0 then
        findings.tell('index_missing', rest, id)
        findings.add('SADD', prefix .. rest, id)
      end
    end
  end
  if not unknown.type then
    if not findings.usable('types') then
      findings.add('SADD', prefix .. 'types', fields.type)
    elseif redis.call('SISMEMBER', prefix .. 'types', fields.type) == 0 then
      findings.tell('index_missing', 'types', fields.type)
      findings.add('SADD', prefix .. 'types', fields.type)
    end
  end

  local function in_order(rest, score, any)
    wanted[rest] = true
    if findings.usable(rest) then
      local found = redis.call('ZSCORE', prefix .. rest, id)
      if found and (any or tonumber(found) == score) then
        return
      end
      findings.tell(found and 'index_score' or 'index_missing', rest, id)
    end
    findings.add('ZADD', prefix .. rest, integer(score), id)
  end

  local created_us, last_us = us_of(fields.created_at), us_of(fields.last_activity)
  if created_us or last_us then
    -- Of a session without a time of creation any place will do: it must not be forgotten.
    in_order('sessions', created_us or last_us, not created_us)
  end
  if not unknown.status then
    local ended = ENDED[fields.status]
    if last_us or created_us then
      in_order(ended and 'ended' or 'activity', last_us or created_us, ended or not last_us)
    end
    wanted[ended and 'ended' or 'activity'] = true
  end
  if fields.owner then
    local expires_us = us_of(fields.lease_expires_at)
    if expires_us then
      in_order('leases', math.floor(expires_us / 1000))
    end
    wanted['leases'] = true
  end
  return wanted
end

-- Entries, totals and bytes of both buffers. `room` is what may be read in this script; a buffer
-- that is larger is told as "large", to be weighed piece by piece.
local function examine_buffers(prefix, id, fields, findings, bounds, room)
  for _, buffer in ipairs({'output', 'error'}) do
    local rest = 'session:' .. id .. (buffer == 'error' and ':errors' or ':output')
    local key, list = prefix .. 'session:' .. id, prefix .. rest
    local length = findings.usable(rest) and redis.call('LLEN', list) or 0
    local total_field, bytes_field = buffer .. '_total', buffer .. '_bytes'
    local total = whole_number(fields[total_field] or '0')
    if not total or total < length then
      findings.tell('buffer_total', rest, fields[total_field] or 'none')
      findings.change('HSET', key, total_field, integer(length))
    end
    local held, weighed = 0, true
    if length > 0 then
      local oldest
      local own = {entries = room.most_entries, bytes = room.most_bytes}
      held, oldest = weigh(list, 0, length - 1, own)
      room.entries = room.entries - (room.most_entries - own.entries)
      room.bytes = room.bytes - (room.most_bytes - own.bytes)
      weighed = oldest == 0
    end
    if not weighed then
      findings.tell('large', rest, buffer)
    elseif whole_number(fields[bytes_field] or '0') ~= held then
      findings.tell('buffer_bytes', rest, fields[bytes_field] or 'none')
      findings.change('HSET', key, bytes_field, integer(held))
    end
    if (bounds.entries > 0 and length > bounds.entries)
      or (weighed and bounds.bytes > 0 and held > bounds.bytes and length > 1) then
      findings.tell('buffer_over_bound', rest, integer(length))
    end
  end
end

-- Keys without prefix in which the session, or what is left of it, was seen: those that should not
-- have it.
local function examine_candidates(prefix, id, is_there, unknown, wanted, candidates, findings)
  local kind = is_there and 'index_stray' or 'index_orphan'
  local looked_at = {}
  for _, rest in ipairs(candidates) do
    local key = prefix .. rest
    local zset, index, value = FIXED[rest] == 'zset', nil, nil
    if not zset then
      index, value = split_index(rest)
    end
    if looked_at[rest] or wanted[rest] then
      -- one of those that are always examined, or where it should be
    elseif index then
      if not unknown[FIELD_OF[index]] and type_of(key) == 'set'
        and redis.call('SISMEMBER', key, id) == 1 then
        findings.tell(kind, rest, id)
        findings.remove('SREM', key, id)
        if index == 'type' and redis.call('SCARD', key) == 1
          and type_of(prefix .. 'types') == 'set' then
          findings.remove('SREM', prefix .. 'types', value)
        end
      end
    elseif zset then
      if not (unknown.status and rest ~= 'leases') and type_of(key) == 'zset'
        and (rest ~= 'sessions' or not is_there) and redis.call('ZSCORE', key, id) then
        findings.tell(kind, rest, id)
        findings.remove('ZREM', key, id)
      end
    elseif owner_of_buffer(rest) and not is_there and type_of(key) ~= 'none' then
      findings.tell('buffer_orphan', rest)
      findings.set_aside(rest)
    end
    looked_at[rest] = true
  end
end

-- Without `whole` only the keys that it was seen in are told of, and its buffers are not weighed.
local function examine(prefix, id, candidates, bounds, overdue_us, room, whole)
  local findings = new_findings(prefix)
  local rest = 'session:' .. id
  -- An id with a colon is nobody's, and its key would be another session's buffer.
  local is_there = not string.find(id, ':', 1, true) and findings.usable(rest)
    and type_of(prefix .. rest) == 'hash'
  local unknown, wanted = {}, {}
  local service
  if is_there then
    local fields
    fields, unknown = examine_fields(prefix, id, findings)
    examine_lease(prefix, id, fields, findings, overdue_us)
    wanted = examine_indexes(prefix, id, fields, unknown, findings)
    if whole then
      examine_buffers(prefix, id, fields, findings, bounds, room)
    end
    service = fields.service_session_id
  end
  examine_candidates(prefix, id, is_there, unknown, wanted, candidates, findings)
  return findings, service
end
