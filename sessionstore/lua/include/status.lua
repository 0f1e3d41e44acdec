-- status: which statuses are an end.
local ENDED = {terminated = true, error = true}
