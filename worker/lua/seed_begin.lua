-- Gives the token that a seed has to show, taken before Postgres is asked: a wipe of Redis takes it along, and what was read before is then of
-- no use. Whoever seeds at the same time shares it, so that nobody waits for anybody, alive or dead.
-- KEYS 1 seeding
-- ARGV 1 a new token  2 for how long it is good (ms)
-- Answers the token.
local token = redis.call('GET', KEYS[1]) or ARGV[1]
redis.call('SET', KEYS[1], token, 'PX', ARGV[2])
return token
