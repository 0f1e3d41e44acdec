-- add_error: append chunks to a session's error buffer, oldest entries making room.
--
-- KEYS    1 lane  2 session  3 its list of errors  4 activity
-- ARGV    1 sequence  2 session id  3 most entries kept, 0 = no bound
--         4 most bytes kept, 0 = no bound  5 fence  6… the chunks
-- Returns ok <entries ever added>
-- Errors  SESSION_NOT_FOUND  LEASE_LOST  WRITES_LOST  SESSION_BUSY
--- @include once, clock, status, lease, known, fence, wake, append
return append('error')
