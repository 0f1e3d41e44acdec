-- wake: news for those who follow, on a channel with the name of the key that has changed: a buffer's
-- list, or the stream of events. It is only a hint, for nothing keeps it, and a user may lack the
-- right to publish: whoever follows looks for itself too, now and then. So its failure is no failure
-- of the write.
local function wake(key, news)
  redis.pcall('PUBLISH', key, news)
end

-- News of a session as a whole, for those who follow one of its buffers.
local function wake_followers(session, news)
  wake(session .. ':output', news)
  wake(session .. ':errors', news)
end
