-- Drops the cached copy of a conversation of which nothing is pending, so that the next read loads it anew, and the lease of whoever loads
-- it already: what that one has read may be older.
-- KEYS 1 conversation  2 messages  3 retry keys  4 lease
-- Answers 1 if no copy is left.
local last = redis.call('HGET', KEYS[1], 'l')
if last and last ~= '0' then return 0 end
redis.call('DEL', KEYS[1], KEYS[2], KEYS[3], KEYS[4])
return 1
