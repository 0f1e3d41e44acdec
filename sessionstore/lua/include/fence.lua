-- fence: who may write to a session. A write carries in its place for a fence
--   ''        none: it passes unless a lease is live
--   F:O:E     F is the fence of its worker's lease: it passes until somebody else has ended that
--             lease. O and E are how many entries of output and of errors the worker knows to have
--             been added: if there were fewer, this server has lost some that were acknowledged
--   'force'   the operator's override: it passes
local FENCE_FIELDS = {'owner', 'fence', 'lease_expires_at', 'output_total', 'error_total'}

local function missing(known, total)
  return math.max(tonumber(known) - total, 0)
end

-- The refusal of a write that may not pass; nil if it may.
local function fenced_off(given, id, status, owner, fence, expires_at, output_total, error_total)
  if given == 'force' then
    return nil
  elseif given ~= '' then
    local own, output_known, errors_known = string.match(given, '^(%d+):(%d+):(%d+)$')
    if not owner or own ~= fence then
      return refuse('LEASE_LOST', {session_id = id, status = status or nil, owner = owner or nil})
    end
    output_total, error_total = tonumber(output_total or 0) or 0, tonumber(error_total or 0) or 0
    local lost = missing(output_known, output_total) + missing(errors_known, error_total)
    if lost == 0 then
      return nil
    end
    return refuse('WRITES_LOST', {session_id = id, status = status or nil, lost = lost,
      output_total = output_total, error_total = error_total})
  end
  local now = iso(now_us)
  if is_live(owner, expires_at, now) then
    return refuse('SESSION_BUSY', held(id, status, owner, expires_at, now))
  end
end
