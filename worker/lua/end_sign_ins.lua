-- Tells all API processes that sign-ins have ended; what nobody can hold a good access token of any more is dropped.
-- KEYS 1 ended
-- ARGV 1 how long that is kept (ms), then the sign-ins' ids
local oldest = int(math.max(0, server_microseconds() / 1000 - ARGV[1]))
for i = 2, #ARGV do redis.call('XADD', KEYS[1], 'MINID', '~', oldest, '*', 'i', ARGV[i]) end
redis.call('PEXPIRE', KEYS[1], ARGV[1])
return 1
