-- Lets committed copies live on after a use. What is pending has no expiry, and must not get one here.
-- KEYS 1 conversation  2 messages  3 retry keys
-- ARGV 1 ttl (s)  2 ttl of what hangs on it (s)
if redis.call('PTTL', KEYS[1]) > 0 then
  redis.call('EXPIRE', KEYS[1], ARGV[1])
  redis.call('EXPIRE', KEYS[2], ARGV[2])
  redis.call('EXPIRE', KEYS[3], ARGV[2])
end
return 1
