-- event: one entry of the lifecycle stream, written by the script that makes the change.
local EVENTS_KEPT = 10000

local function event(stream, name, id, type, actor, ...)
  redis.call('XADD', stream, 'MAXLEN', '~', EVENTS_KEPT, '*',
    'event', name, 'session_id', id, 'type', type or '', 'actor', actor, ...)
  wake(stream, name)
end
