-- fence: who may write to a session. A write carries in its place for a fence
--   ''        none: it passes unless a lease is live
--   F:O:E     the token of its worker's lease: it passes until somebody else has ended that lease,
--             and unless this server has lost some of the worker's entries
--   'force'   the operator's override: it passes
local FENCE_FIELDS = {'owner', 'fence', 'lease_expires_at', 'output_total', 'error_total'}

-- The refusal of a write that may not pass; nil if it may.
local function fenced_off(given, id, status, owner, fence, expires_at, output_total, error_total)
  if given == 'force' then
    return nil
  elseif given ~= '' then
    local own, lost = read_token(given, output_total, error_total)
    if not owner or own ~= fence then
      return refuse('LEASE_LOST', {session_id = id, status = status or nil, owner = owner or nil})
    elseif lost == 0 then
      return nil
    end
    return refuse('WRITES_LOST', {session_id = id, status = status or nil, lost = lost,
      output_total = count_of(output_total), error_total = count_of(error_total)})
  end
  local now = iso(now_us)
  if is_live(owner, expires_at, now) then
    return refuse('SESSION_BUSY', held(id, status, owner, expires_at, now))
  end
end
