-- Removes exactly these entries from the log, after the commit that made them safe. Safe to run twice, and late.
-- KEYS 1 log  2 committed  3 bytes  4 wake, then for each conversation: conversation, messages, retry keys, changed, created keys
-- ARGV 1 ttl (s)  2 ttl of what hangs on a conversation (s)  3 committed messages to keep  4 number of entries  5 number of conversations
--      then whole entry ids, entry sizes, conversation ids; then triples: position of the conversation, id of a message that must leave the cache, its retry key
-- Answers {entries left, 1 if somebody already asked for the next flush}.
local ttl, ttl_rest, keep, entries, conversations = ARGV[1], ARGV[2], tonumber(ARGV[3]), tonumber(ARGV[4]), tonumber(ARGV[5])
local committed = tonumber(redis.call('GET', KEYS[2]) or '0')
local at = 5

local freed = 0
for i = 1, entries do
  local id = ARGV[at + i]
  if redis.call('XDEL', KEYS[1], id) == 1 then freed = freed + tonumber(ARGV[at + entries + i]) end
  committed = math.max(committed, tonumber(string.match(id, '^%d+')))
end
if freed > 0 then redis.call('DECRBY', KEYS[3], int(freed)) end
if entries > 0 then redis.call('SET', KEYS[2], int(committed)) end
at = at + 2 * entries

-- First what was committed under another id: its copy is not history.
for i = at + conversations + 1, #ARGV, 3 do
  local base = 4 + 5 * (tonumber(ARGV[i]) - 1)
  redis.call('XDEL', KEYS[base + 2], ARGV[i + 1] .. '-0')
  if ARGV[i + 2] ~= '' then redis.call('HDEL', KEYS[base + 3], ARGV[i + 2]) end
  if redis.call('EXISTS', KEYS[base + 1]) == 1 then redis.call('HSET', KEYS[base + 1], 'k', '0') end
end

for i = 1, conversations do
  local base = 4 + 5 * (i - 1)
  local conversation, messages = KEYS[base + 1], KEYS[base + 2]
  local last = redis.call('HGET', conversation, 'l')
  if last and last ~= '0' and tonumber(last) <= committed then
    redis.call('HSET', conversation, 'l', '0')
    redis.call('ZREM', KEYS[base + 4], ARGV[at + i])
    if redis.call('XLEN', messages) > keep then
      redis.call('XTRIM', messages, 'MAXLEN', '=', keep)
      redis.call('HSET', conversation, 'w', '0')
    end
    redis.call('EXPIRE', conversation, ttl)
    redis.call('EXPIRE', messages, ttl_rest)
    redis.call('EXPIRE', KEYS[base + 3], ttl_rest)
    if redis.call('EXISTS', KEYS[base + 4]) == 0 then redis.call('EXPIRE', KEYS[base + 5], ttl_rest) end
  elseif last then
    -- Still busy: drop the oldest beyond the cap, but nothing that is pending, and not many at once (their bodies pass through Lua).
    local over = redis.call('XLEN', messages) - 2 * keep
    if over > 0 then
      local oldest = redis.call('XRANGE', messages, '-', '+', 'COUNT', math.min(over, 256) + 1)
      local floor = math.min(tonumber(string.match(oldest[#oldest][1], '^%d+')), committed + 1)
      if redis.call('XTRIM', messages, 'MINID', '=', int(floor)) > 0 then redis.call('HSET', conversation, 'w', '0') end
    end
  else  -- its keys are gone (somebody emptied the cache): Postgres knows it all
    redis.call('ZREM', KEYS[base + 4], ARGV[at + i])
  end
end
return {redis.call('XLEN', KEYS[1]), redis.call('EXISTS', KEYS[4])}
