-- Asks whoever writes the reply to stop.
-- KEYS 1 turn  2 stop
-- ARGV 1 how long the request stands (ms)
-- Answers 1 if a turn is running.
local token = redis.call('GET', KEYS[1])
if not token then return 0 end
redis.call('SET', KEYS[2], token, 'PX', ARGV[1])
return 1
