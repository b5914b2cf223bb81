-- Adds an event to the reply that is being written and keeps its turn, or, without an event, only keeps the turn. Fenced by the turn's
-- token: a stalled writer adds nothing to the next turn's reply. Run twice it adds once. The last event ends the turn in the same step.
-- KEYS 1 reply  2 turn  3 stop  4 turns  5 events
-- ARGV 1 token  2 turn lease (ms)  3 'conversation:user'  4 event's id or ''  5 event  6 data  7 how long a finished reply stays (ms)  8 '1' for the last event
-- Answers 'OK', 'STOP' (somebody asked for it) or 'LOST' (the turn is not the caller's any more).
if redis.call('GET', KEYS[2]) ~= ARGV[1] then return 'LOST' end
if ARGV[4] ~= '' and not redis.call('XRANGE', KEYS[1], ARGV[4], ARGV[4])[1] then
  redis.call('XADD', KEYS[1], ARGV[4], 'e', ARGV[5], 'd', ARGV[6], 'l', ARGV[8])
end
if ARGV[8] == '1' then
  redis.call('PEXPIRE', KEYS[1], ARGV[7])
  redis.call('DEL', KEYS[2], KEYS[3])
  redis.call('HDEL', KEYS[4], ARGV[3])
  tell(KEYS[5], 'reply', string.match(ARGV[3], '^%d+'), '0', '', '')
  return 'OK'
end
if redis.call('PTTL', KEYS[2]) < ARGV[2] * 2 / 3 then redis.call('PEXPIRE', KEYS[2], ARGV[2]) end
return redis.call('GET', KEYS[3]) == ARGV[1] and 'STOP' or 'OK'
