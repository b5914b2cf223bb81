-- Installs the retry keys of the conversations that a user created, read from Postgres, if the lease is still the loader's.
-- KEYS 1 created keys  2 lease  3 changed
-- ARGV 1 token  2 ttl (s)  3 '1' if these are all of them, then pairs of key and value
-- Answers {'OK'} or {'LOST'}.
if redis.call('GET', KEYS[2]) ~= ARGV[1] then return {'LOST'} end
redis.call('DEL', KEYS[2])
for i = 4, #ARGV, 2 do
  redis.call('HSETNX', KEYS[1], ARGV[i], ARGV[i + 1])
end
-- What Postgres answered counts as long as this mark is here: it goes with the keys.
if ARGV[3] == '1' then redis.call('HSET', KEYS[1], '*', '1') else redis.call('HSET', KEYS[1], '?', ARGV[1]) end
if redis.call('EXISTS', KEYS[3]) == 0 then redis.call('EXPIRE', KEYS[1], ARGV[2]) end
return {'OK'}
