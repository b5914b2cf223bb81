-- Ends a reply whose writer is gone, with the event that says what became of it. Any number of processes may try.
-- KEYS 1 reply  2 turn  3 stop  4 turns  5 events
-- ARGV 1 'conversation:user'  2 event or '' if the conversation is gone  3 data  4 how long a finished reply stays (ms)
-- Answers 1 if it is ended now, 0 if its turn is held (the writer lives, or somebody tries the reply again).
if redis.call('EXISTS', KEYS[2]) == 1 then return 0 end
redis.call('HDEL', KEYS[4], ARGV[1])
tell(KEYS[5], 'reply', string.match(ARGV[1], '^%d+'), '0', '', '')
if ARGV[2] == '' then
  redis.call('DEL', KEYS[1], KEYS[3])
  return 1
end
local last = redis.call('XREVRANGE', KEYS[1], '+', '-', 'COUNT', 1)[1]
if last and not is_end(last) then
  local turn, n = string.match(last[1], '^(%d+)-(%d+)$')
  redis.call('XADD', KEYS[1], turn .. '-' .. int(n + 1), 'e', ARGV[2], 'd', ARGV[3], 'l', '1')
  redis.call('PEXPIRE', KEYS[1], ARGV[4])
end
return 1
