-- removal: a session with its buffers, out of every index.

-- What is to be removed with a session: its type, its status, its index sets; and how many entries
-- its buffers have had, for who follows them and has not read them all.
local function removal_of(prefix, id)
  local stored = redis.call('HMGET', prefix .. 'session:' .. id,
    'type', 'status', 'service_session_id', 'task_id', 'mcp_session_id', 'owner',
    'output_total', 'error_total')
  local sets = {}
  for i, name in ipairs({'type', 'status', 'service', 'task', 'mcp', 'owner'}) do
    if stored[i] then
      sets[#sets + 1] = prefix .. 'sessions:' .. name .. ':' .. stored[i]
    end
  end
  return {type = stored[1], status = stored[2], sets = sets,
    output_total = stored[7] or '0', error_total = stored[8] or '0'}
end

local function remove(prefix, id, removal, actor)
  local session = prefix .. 'session:' .. id
  redis.call('UNLINK', session, session .. ':output', session .. ':errors')
  for _, name in ipairs({'sessions', 'activity', 'ended', 'leases'}) do
    redis.call('ZREM', prefix .. name, id)
  end
  for _, set in ipairs(removal.sets) do
    redis.call('SREM', set, id)
  end
  local type = removal.type
  if type and redis.call('EXISTS', prefix .. 'sessions:type:' .. type) == 0 then
    redis.call('SREM', prefix .. 'types', type)
  end
  event(prefix .. 'events', 'deleted', id, type, actor, 'old_status', removal.status or '',
    'output_total', removal.output_total, 'error_total', removal.error_total)
  wake_followers(session, 'deleted')
end
