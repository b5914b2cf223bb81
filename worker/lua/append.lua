-- Appends a message to the pending log: the one script behind an acknowledgement. All checks come before the first write.
-- KEYS 1 log  2 clock  3 bytes  4 wake  5 conversation  6 messages  7 retry keys  8 changed  9 committed  10 turn  11 events  12 users
--      13 messages of this minute
-- ARGV 1 shard  2 user  3 conversation id  4 body  5 retry key or ''  6 request hash  7 title if the conversation has none, or ''
--      8 backlog limit (bytes)  9 wake lease (ms)  10 the token of the question to Postgres about the key, or ''  11 turn token or ''  12 turn lease (ms)  13 the user's limit (bytes)
--      14 messages a minute
-- Answers {'OK', id, microseconds, wake}; {'REPLAY', id, committed, {stored message}, reply id or ''}; or one of
--   {'UNKNOWN'} ask Postgres for this user's   {'NOT_FOUND'} deleted   {'ASK_KEY'} Postgres may know the key
--   {'NEED_SEED'} the clock is gone   {'FULL'} the backlog is at its limit   {'USER_FULL'}   {'KEY_REUSED'}   {'TURN_RUNNING'}
--   {'TOO_MANY', for how long (ms)}
-- Run twice with a retry key it appends once; that is what makes a lost reply harmless.
local known = redis.call('HMGET', KEYS[5], 'u', 'd', 'l', 't', 'k', 'm', 'a', 's')
if known[1] ~= ARGV[2] then return {'UNKNOWN'} end  -- also somebody else's: nobody may learn which ids there are, not even while Postgres is away
if known[2] == '1' then return {'NOT_FOUND'} end

local key, replayed = ARGV[5], nil
if key ~= '' then
  local used = redis.call('HGET', KEYS[7], key)
  if used then
    local id, hash = string.match(used, '^(%d+):(.*)$')
    if hash ~= ARGV[6] then return {'KEY_REUSED'} end
    local reply = string.match(redis.call('HGET', KEYS[7], 'r:' .. id) or '', '^%d+') or ''
    replayed = {'REPLAY', id, known[3] == '0' and id or redis.call('GET', KEYS[9]) or '0', redis.call('XRANGE', KEYS[6], id, id), reply}
    if reply ~= '' or ARGV[11] == '' then return replayed end
  elseif known[5] ~= '1' and redis.call('HGET', KEYS[7], '?') ~= ARGV[10] then
    return {'ASK_KEY'}
  end
end

if ARGV[11] ~= '' and held(KEYS[10], ARGV[12]) then return {'TURN_RUNNING'} end
if replayed then
  redis.call('SET', KEYS[10], ARGV[11], 'PX', ARGV[12])
  return replayed
end

local wait = has_to_wait(KEYS[13], ARGV[14], MINUTE_MS)
if wait then return {'TOO_MANY', wait} end
local last_tick = redis.call('GET', KEYS[2])
if not last_tick then return {'NEED_SEED'} end
local title = known[4] == '' and ARGV[7] or ''
local size = entry_size(ARGV[4], key, title)
local full = no_room(KEYS[3], KEYS[12], ARGV[2], size, ARGV[8], ARGV[13])
if full then return {full} end

local now = server_microseconds()
local id, tick = next_id(tonumber(last_tick), tonumber(ARGV[1]), now)
if id <= tonumber(known[6]) then return {'NEED_SEED'} end  -- Postgres is ahead of this clock: Redis was restored from an older state
if not append_entry(KEYS[1], KEYS[2], KEYS[3], KEYS[12], ARGV[2], id, tick, size, 'm', now, ARGV[4], key, title) then return {'NEED_SEED'} end
id = int(id)
count(KEYS[13], ARGV[14], MINUTE_MS)
redis.call('XADD', KEYS[6], id .. '-0', 't', int(now), 'b', ARGV[4])
redis.call('HSET', KEYS[5], 'l', id, 'm', id, 'a', int(math.max(now, known[7])))  -- as in Postgres, it never goes back
if title ~= '' then redis.call('HSET', KEYS[5], 't', title) end
if key ~= '' then redis.call('HSET', KEYS[7], key, id .. ':' .. ARGV[6]) end
if known[3] == '0' then  -- clean until now: from here on nothing of it may expire
  redis.call('PERSIST', KEYS[5])
  redis.call('PERSIST', KEYS[6])
  redis.call('PERSIST', KEYS[7])
end
redis.call('ZADD', KEYS[8], id, ARGV[3])
if ARGV[11] ~= '' then redis.call('SET', KEYS[10], ARGV[11], 'PX', ARGV[12]) end
tell(KEYS[11], 'message', id, int(now), ARGV[4], '')
if title ~= '' then tell(KEYS[11], 'conversation', ARGV[3], title, known[8], int(now)) end
return {'OK', id, int(now), ask_for_flush(KEYS[1], KEYS[4], ARGV[9])}
