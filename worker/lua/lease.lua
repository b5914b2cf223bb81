-- Takes a lease.
-- KEYS 1 lease
-- ARGV 1 token  2 lease (ms)
-- Answers 1 if it is the caller's now.
if held(KEYS[1], ARGV[2]) then return 0 end
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
return 1
