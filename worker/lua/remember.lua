-- Adds a retry key that Postgres knew to a cached conversation.
-- KEYS 1 conversation  2 retry keys
-- ARGV pairs of key and value
if redis.call('EXISTS', KEYS[1]) == 0 then return 0 end
local fresh = redis.call('EXISTS', KEYS[2]) == 0
for i = 1, #ARGV, 2 do redis.call('HSETNX', KEYS[2], ARGV[i], ARGV[i + 1]) end
local ttl = redis.call('PTTL', KEYS[1])
if fresh and ttl > 0 then redis.call('PEXPIRE', KEYS[2], ttl + 60000) end
return 1
