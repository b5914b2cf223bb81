-- Installs a conversation that was read from Postgres, if the lease is still the loader's: a slow loader never overwrites a newer state.
-- KEYS 1 conversation  2 messages  3 retry keys  4 lease
-- ARGV 1 token  2 ttl (s)  3 ttl of what hangs on it (s)  4 user  5 title  6 created  7 last activity  8 last message id  9 whole  10 all keys
--      11 deleted  12 number of messages, then for each: id, microseconds, body; then pairs of retry key and value
-- Answers {'OK'}, {'KNOWN'} (somebody was faster) or {'LOST'} (the lease is another's).
if redis.call('GET', KEYS[4]) ~= ARGV[1] then return {'LOST'} end
redis.call('DEL', KEYS[4])
if redis.call('EXISTS', KEYS[1]) == 1 then return {'KNOWN'} end
redis.call('DEL', KEYS[2], KEYS[3])
local count = tonumber(ARGV[12])
for i = 13, 12 + 3 * count, 3 do
  redis.call('XADD', KEYS[2], ARGV[i] .. '-0', 't', ARGV[i + 1], 'b', ARGV[i + 2])
end
for i = 13 + 3 * count, #ARGV, 2 do
  redis.call('HSET', KEYS[3], ARGV[i], ARGV[i + 1])
end
redis.call('HSET', KEYS[1], 'u', ARGV[4], 't', ARGV[5], 's', ARGV[6], 'a', ARGV[7], 'm', ARGV[8], 'l', '0', 'w', ARGV[9], 'k', ARGV[10], 'd', ARGV[11])
redis.call('EXPIRE', KEYS[1], ARGV[2])
redis.call('EXPIRE', KEYS[2], ARGV[3])
redis.call('EXPIRE', KEYS[3], ARGV[3])
return {'OK'}
