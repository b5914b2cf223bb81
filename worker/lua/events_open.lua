-- Opens a user's event stream for a reader: from here on the other scripts write to it, until nobody has read it for a while.
-- KEYS 1 events
-- ARGV 1 how long it lives without a reader (ms)  2 the last event that the reader has seen, or ''
-- Answers {the event to go on after, 1 if that is where the reader left off, 0 if something may be missing (or this is a first visit)}.
if redis.call('EXISTS', KEYS[1]) == 0 then redis.call('XADD', KEYS[1], '*', 'e', 'open', 'a', '', 'b', '', 'c', '', 'd', '') end
redis.call('PEXPIRE', KEYS[1], ARGV[1])
if ARGV[2] ~= '' and redis.call('XRANGE', KEYS[1], ARGV[2], ARGV[2])[1] then return {ARGV[2], 1} end
return {redis.call('XREVRANGE', KEYS[1], '+', '-', 'COUNT', 1)[1][1], 0}
