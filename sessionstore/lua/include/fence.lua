-- fence: who may write to a session. A write carries in its place for a fence
--   ''        none: it passes unless a lease is live
--   a number  the fence of its worker's lease: it passes until somebody else has ended that lease
--   'force'   the operator's override: it passes

-- The refusal of a write that may not pass; nil if it may.
local function fenced_off(given, id, status, owner, fence, expires_at)
  if given == 'force' then
    return nil
  elseif given ~= '' then
    if owner and given == fence then
      return nil
    end
    return refuse('LEASE_LOST', {session_id = id, status = status or nil, owner = owner or nil})
  end
  local now = iso(now_us)
  if is_live(owner, expires_at, now) then
    return refuse('SESSION_BUSY', held(id, status, owner, expires_at, now))
  end
end
