-- Appends messages to the pending log, in their order and as one step: the one script behind an acknowledgement. All checks come before the
-- first write.
-- KEYS 1 log  2 clock  3 bytes  4 wake  5 conversation  6 messages  7 retry keys  8 changed  9 committed  10 turn  11 events  12 users
--      13 messages of this minute
-- ARGV 1 shard  2 user  3 conversation id  4 title if the conversation has none, or ''  5 backlog limit (bytes)  6 wake lease (ms)
--      7 the token of the question to Postgres about the keys, or ''  8 turn token or ''  9 turn lease (ms)  10 the user's limit (bytes)
--      11 messages a minute  12 the retry key that one more message would have, or ''
--      then for each message: body, retry key or '', request hash
-- Answers {'OK', microseconds, wake, id…}; {'REPLAY', committed, reply id or '', and for each message: id, {stored message}}; or one of
--   {'UNKNOWN'} ask Postgres for this user's   {'NOT_FOUND'} deleted   {'ASK_KEY'} Postgres may know the keys
--   {'NEED_SEED'} the clock is gone   {'FULL'} the backlog is at its limit   {'USER_FULL'}   {'KEY_REUSED'}   {'TURN_RUNNING'}
--   {'TOO_MANY', for how long (ms)}
-- Run twice with retry keys it appends once; that is what makes a lost reply harmless. Where the first key is known, so are the others that
-- came with it: they are written together, committed together, asked for together, and loaded from the newest on. (Unless one of them became
-- a dead letter, which no append should: then a retry after the cache has gone may be refused as another list, or stored again.)
local FIRST, EACH = 13, 3
local ALONE = {}
local known = redis.call('HMGET', KEYS[5], 'u', 'd', 'l', 't', 'k', 'm', 'a', 's')
if known[1] ~= ARGV[2] then return {'UNKNOWN'} end  -- also somebody else's: nobody may learn which ids there are, not even while Postgres is away
if known[2] == '1' then return {'NOT_FOUND'} end

local replayed
if ARGV[12] ~= '' then
  if redis.call('HEXISTS', KEYS[7], ARGV[FIRST + 1]) == 1 then
    if redis.call('HEXISTS', KEYS[7], ARGV[12]) == 1 then return {'KEY_REUSED'} end
    replayed = {'REPLAY', '', ''}
    local id, hash
    for i = FIRST, #ARGV, EACH do
      id, hash = string.match(redis.call('HGET', KEYS[7], ARGV[i + 1]) or '', '^(%d+):(.*)$')
      if hash ~= ARGV[i + 2] then return {'KEY_REUSED'} end
      replayed[#replayed + 1] = id
      replayed[#replayed + 1] = redis.call('XRANGE', KEYS[6], id, id)
    end
    replayed[2] = known[3] == '0' and id or redis.call('GET', KEYS[9]) or '0'
    replayed[3] = string.match(redis.call('HGET', KEYS[7], 'r:' .. id) or '', '^%d+') or ''
    if replayed[3] ~= '' or ARGV[8] == '' then return replayed end
  elseif known[5] ~= '1' and redis.call('HGET', KEYS[7], '?') ~= ARGV[7] then
    return {'ASK_KEY'}
  end
end

if ARGV[8] ~= '' and held(KEYS[10], ARGV[9]) then return {'TURN_RUNNING'} end
if replayed then
  redis.call('SET', KEYS[10], ARGV[8], 'PX', ARGV[9])
  return replayed
end

local counted = redis.call('MGET', KEYS[2], KEYS[3], KEYS[13])  -- a call of Redis takes 1.5 µs, whatever it does
local wait = has_to_wait(KEYS[13], counted[3], ARGV[11], MINUTE_MS)
if wait then return {'TOO_MANY', wait} end
local tick, held_bytes = counted[1], tonumber(counted[2] or '0')
if not tick then return {'NEED_SEED'} end
local title, size = known[4] == '' and ARGV[4] or '', 0
for i = FIRST, #ARGV, EACH do size = size + entry_size(ARGV[i], ARGV[i + 1], i == FIRST and title or '') end
local full = no_room(held_bytes, KEYS[12], ARGV[2], size, ARGV[5], ARGV[10])
if full then return {full} end

local now = server_microseconds()
local answer, id = {'OK', int(now), 0}, nil
for i = FIRST, #ARGV, EACH do
  local body, key, extra = ARGV[i], ARGV[i + 1], i == FIRST and title or ''
  id, tick = next_id(tonumber(tick), tonumber(ARGV[1]), now)
  if id <= tonumber(known[6]) then return {'NEED_SEED'} end  -- Postgres is ahead of this clock: Redis was restored from an older state
  local followers = (#ARGV - i + 1) / EACH - 1
  local more = followers > 0 and {'n', followers} or ALONE
  if not append_entry(KEYS[1], id, ARGV[2], 'm', now, body, key, extra, unpack(more)) then return {'NEED_SEED'} end
  id = int(id)
  redis.call('XADD', KEYS[6], id .. '-0', 't', answer[2], 'b', body)
  if key ~= '' then redis.call('HSET', KEYS[7], key, id .. ':' .. ARGV[i + 2]) end
  tell(KEYS[11], 'message', id, answer[2], body, '')
  answer[#answer + 1] = id
end
count_entries(KEYS[2], KEYS[3], KEYS[12], ARGV[2], tick, held_bytes, size)
count(KEYS[13], ARGV[11], MINUTE_MS, #answer - 3)
redis.call('HSET', KEYS[5], 'l', id, 'm', id, 'a', int(math.max(now, known[7])))  -- as in Postgres, it never goes back
if title ~= '' then redis.call('HSET', KEYS[5], 't', title) end
if known[3] == '0' then  -- clean until now: from here on nothing of it may expire
  redis.call('PERSIST', KEYS[5])
  redis.call('PERSIST', KEYS[6])
  redis.call('PERSIST', KEYS[7])
end
redis.call('ZADD', KEYS[8], id, ARGV[3])
if ARGV[8] ~= '' then redis.call('SET', KEYS[10], ARGV[8], 'PX', ARGV[9]) end
if title ~= '' then tell(KEYS[11], 'conversation', ARGV[3], title, known[8], answer[2]) end
answer[3] = ask_for_flush(KEYS[1], KEYS[4], ARGV[6])
return answer
