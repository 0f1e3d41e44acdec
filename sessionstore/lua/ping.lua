-- ping: the server is there and runs scripts.
--
-- KEYS    1 meta, only to say which server is asked
-- Returns 1
return 1
