-- Reads the events of a reply after one of them.
-- KEYS 1 reply  2 turn
-- ARGV 1 the last event that is known, or ''  2 count
-- Answers {1 if the turn is still running, {events}}.
local from = ARGV[1] == '' and '-' or '(' .. ARGV[1]
return {redis.call('EXISTS', KEYS[2]), redis.call('XRANGE', KEYS[1], from, '+', 'COUNT', ARGV[2])}
