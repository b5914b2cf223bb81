-- Keeps or ends the lease on a conversation's turn, if it is still the caller's.
-- KEYS 1 turn
-- ARGV 1 token  2 lease (ms), or '0' to end it
-- Answers 1 if the lease was the caller's.
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
if ARGV[2] == '0' then redis.call('DEL', KEYS[1]) else redis.call('PEXPIRE', KEYS[1], ARGV[2]) end
return 1
