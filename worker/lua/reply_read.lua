-- Reads the events of a reply after one of them.
-- KEYS 1 reply  2 turn
-- ARGV 1 the last event that is known, or ''  2 count
-- Answers {1 if its turn is held, 1 if the reply has ended (or there is none), {events}}.
local from = ARGV[1] == '' and '-' or '(' .. ARGV[1]
local last = redis.call('XREVRANGE', KEYS[1], '+', '-', 'COUNT', 1)[1]
return {redis.call('EXISTS', KEYS[2]), (not last or is_end(last)) and 1 or 0, redis.call('XRANGE', KEYS[1], from, '+', 'COUNT', ARGV[2])}
