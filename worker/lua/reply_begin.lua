-- Begins the stream of a reply, for whoever holds the conversation's turn.
-- KEYS 1 reply  2 turn  3 stop  4 turns  5 events
-- ARGV 1 token  2 turn lease (ms)  3 'conversation:user'  4 user message's id  5 its data  6 '1' to drop an abandoned reply
-- Events are numbered `<user message's id>-<n>`, so that an event's id says which turn it belongs to, whatever clocks do.
-- Answers {'OK', n of the first event}, {'LOST'} (the turn is not the caller's), or {'ABANDONED'}: the last reply has no end, store it first.
if redis.call('GET', KEYS[2]) ~= ARGV[1] then return {'LOST'} end
local last = redis.call('XREVRANGE', KEYS[1], '+', '-', 'COUNT', 1)[1]
local n = 1
if last then
  if not is_end(last) and ARGV[6] ~= '1' then return {'ABANDONED'} end
  local turn, seen = string.match(last[1], '^(%d+)-(%d+)$')
  if turn == ARGV[4] then n = tonumber(seen) + 1 end  -- tried again: a reader who knows the first try misses nothing
end
redis.call('DEL', KEYS[1], KEYS[3])
redis.call('XADD', KEYS[1], ARGV[4] .. '-' .. int(n), 'e', 'user_message', 'd', ARGV[5], 'l', '0')
redis.call('HSET', KEYS[4], ARGV[3], ARGV[1])
redis.call('PEXPIRE', KEYS[2], ARGV[2])
tell(KEYS[5], 'reply', string.match(ARGV[3], '^%d+'), '1', '', '')
return {'OK', n}
