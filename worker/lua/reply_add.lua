-- Adds an event to the reply that is being written, and keeps its turn. Fenced by the turn's token: a stalled writer adds nothing to the
-- next turn's reply.
-- KEYS 1 reply  2 turn
-- ARGV 1 token  2 turn lease (ms)  3 lifetime of the reply after its last event (ms)  4 '1' to begin a new reply  5 event  6 data
-- Answers the event's id, or '' if the turn is no longer the caller's.
if redis.call('GET', KEYS[2]) ~= ARGV[1] then return '' end
if ARGV[4] == '1' then redis.call('DEL', KEYS[1]) end
local id = redis.call('XADD', KEYS[1], '*', 'e', ARGV[5], 'd', ARGV[6])
redis.call('PEXPIRE', KEYS[1], ARGV[3])
redis.call('PEXPIRE', KEYS[2], ARGV[2])
return id
