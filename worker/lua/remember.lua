-- Adds what Postgres knew of a retry key to a cached conversation, if the lease is still the asker's.
-- KEYS 1 conversation  2 retry keys  3 lease
-- ARGV 1 token, then pairs of key and value
-- Answers {'OK'} or {'LOST'}.
if redis.call('GET', KEYS[3]) ~= ARGV[1] or redis.call('EXISTS', KEYS[1]) == 0 then return {'LOST'} end
redis.call('DEL', KEYS[3])
local fresh = redis.call('EXISTS', KEYS[2]) == 0
redis.call('HSET', KEYS[2], '?', ARGV[1])  -- the answer is known as long as this is here
for i = 2, #ARGV, 2 do redis.call('HSETNX', KEYS[2], ARGV[i], ARGV[i + 1]) end
local ttl = redis.call('PTTL', KEYS[1])
if fresh and ttl > 0 then redis.call('PEXPIRE', KEYS[2], ttl + 60000) end
return {'OK'}
