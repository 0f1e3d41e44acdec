-- lease: a session in the hands of one worker.
--
-- It has the fields owner, fence and lease_expires_at, and is in leases and in its owner's set; the
-- lease is live until it expires. The fence grows with each claim and outlives its lease.
local LEASE_FIELDS = {'owner', 'fence', 'lease_expires_at'}

-- Times of one format compare as text.
local function is_live(owner, expires_at, now)
  return owner and expires_at and expires_at > now
end

-- What a refusal tells of a session under a lease.
local function held(id, status, owner, expires_at, now)
  return {session_id = id, status = status, owner = owner, expires_at = expires_at, now = now}
end

local function end_lease(prefix, id, owner)
  redis.call('HDEL', prefix .. 'session:' .. id, 'owner', 'lease_expires_at', 'reap_seen_ms')
  redis.call('ZREM', prefix .. 'leases', id)
  redis.call('SREM', prefix .. 'sessions:owner:' .. owner, id)
end
