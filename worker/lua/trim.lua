-- Removes exactly these entries from the log, after the commit that made them safe. Safe to run twice, and late.
-- A flush reads the log from its first entry on and leaves none out, and an entry is only ever added behind the last one. So if the log still
-- begins with the first of a batch, and holds the last, what lies between is that batch and nothing else: all up to the last goes at once, with
-- the sums that the caller made. (Named one by one, of which it has to find each again, Redis needed 2 µs more for each.) Where that is not
-- so (another trim was faster; somebody emptied the log, or restored an older one) each is named, and looked at.
-- KEYS 1 log  2 committed  3 bytes  4 wake  5 users, then for each conversation: conversation, messages, retry keys, load lease, changed, created keys,
--      events
-- ARGV 1 ttl (s)  2 ttl of what hangs on a conversation (s)  3 committed messages to keep  4 the highest id among the entries, or 0
--      5 'run' or 'each'  6 number of entry ids  7 number of users  8 number of conversations (those whose last entry is among these), then whole
--      entry ids (of a run the first and the last, else all); users; the bytes of each; conversation ids; then triples: position of the
--      conversation, id of a message that must leave the cache, its retry key
-- Answers {entries left, 1 if somebody already asked for the next flush}; {'EACH'}, and nothing done, if it is no run.
local ttl, ttl_rest, keep = ARGV[1], ARGV[2], tonumber(ARGV[3])
local entries, users, conversations, at = tonumber(ARGV[6]), tonumber(ARGV[7]), tonumber(ARGV[8]), 8

local freed, freed_of = 0, {}
local function free(user, size)
  freed = freed + size
  freed_of[user] = (freed_of[user] or 0) + size
end
local function find(id)
  return redis.call('XRANGE', KEYS[1], id, id)[1]
end
if ARGV[5] == 'run' then
  local first, last = ARGV[at + 1], ARGV[at + 2]
  local head = redis.call('XRANGE', KEYS[1], '-', '+', 'COUNT', 1)[1]
  if not head or head[1] ~= first or not find(last) then return {'EACH'} end
  redis.call('XTRIM', KEYS[1], 'MINID', '=', last)
  redis.call('XDEL', KEYS[1], last)
  for i = at + entries + 1, at + entries + users do free(ARGV[i], tonumber(ARGV[i + users])) end
else
  redis.call('XDEL', KEYS[1], '0-0')  -- a script that begins with a deletion may go on over `maxmemory`
  for i = at + 1, at + entries do
    local found = find(ARGV[i])
    if found then
      redis.call('XDEL', KEYS[1], ARGV[i])
      local field = {}
      for j = 1, #found[2], 2 do field[found[2][j]] = found[2][j + 1] end
      free(field.u or '', entry_size(field.b or '', field.x or '', field.a or ''))
    end
  end
end
at = at + entries + 2 * users
local left = redis.call('XLEN', KEYS[1])
if left == 0 then
  redis.call('SET', KEYS[3], '0')  -- what somebody planted in the log was never counted
  redis.call('DEL', KEYS[5])
elseif freed > 0 then
  redis.call('DECRBY', KEYS[3], int(freed))
  for user, size in pairs(freed_of) do
    if user ~= '' and redis.call('HINCRBY', KEYS[5], user, int(-size)) <= 0 then redis.call('HDEL', KEYS[5], user) end
  end
end
local committed = math.max(tonumber(redis.call('GET', KEYS[2]) or '0'), tonumber(ARGV[4]))
if committed > 0 then redis.call('SET', KEYS[2], int(committed)) end

-- First what was committed under another id: its copy is not history.
for i = at + conversations + 1, #ARGV, 3 do
  local base = 5 + 7 * (tonumber(ARGV[i]) - 1)
  redis.call('XDEL', KEYS[base + 2], ARGV[i + 1] .. '-0')
  if ARGV[i + 2] ~= '' then redis.call('HDEL', KEYS[base + 3], ARGV[i + 2]) end
  if redis.call('EXISTS', KEYS[base + 1]) == 1 then redis.call('HSET', KEYS[base + 1], 'k', '0') end
end

for i = 1, conversations do
  local base = 5 + 7 * (i - 1)
  local conversation, messages, retry_keys, lease, changed = unpack(KEYS, base + 1, base + 5)
  local last = redis.call('HGET', conversation, 'l')
  local clean = last and tonumber(last) <= committed
  if clean or not last then  -- or its keys are gone (somebody emptied the cache): then Postgres knows it all
    redis.call('ZREM', changed, ARGV[at + i])
    redis.call('DEL', lease)  -- what a loader has read may be older than this commit, and the keys may be gone before it comes
    if redis.call('EXISTS', changed) == 0 then redis.call('EXPIRE', KEYS[base + 6], ttl_rest) end
  end
  if last then
    -- Of a busy one as many as the log holds may be pending; they are the newest. Twice the cap, so that not every trim has to cut.
    local most, cut = keep, keep
    if not clean then most, cut = 2 * keep + left, keep + left end
    if redis.call('XLEN', messages) > most then
      redis.call('XTRIM', messages, 'MAXLEN', '=', int(cut))
      redis.call('HSET', conversation, 'w', '0')
    end
  end
  if last then tell(KEYS[base + 7], 'committed', ARGV[at + i], int(committed), '', '') end
  if clean then
    redis.call('HSET', conversation, 'l', '0')
    redis.call('EXPIRE', conversation, ttl)
    redis.call('EXPIRE', messages, ttl_rest)
    redis.call('EXPIRE', retry_keys, ttl_rest)
  end
end
return {left, redis.call('EXISTS', KEYS[4])}
