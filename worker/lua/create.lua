-- Appends a new conversation to the pending log.
-- KEYS 1 log  2 clock  3 bytes  4 wake  5 conversation  6 changed  7 created keys  8 events  9 users  10 committed
--      11 conversations of this day
-- ARGV 1 shard  2 user  3 conversation id (reserved)  4 body  5 retry key or ''  6 request hash  7 title or ''
--      8 backlog limit (bytes)  9 wake lease (ms)  10 the token of the question to Postgres about the key, or ''  11 the user's limit (bytes)
--      12 a token of this call  13 conversations a day
-- Answers {'OK', id, microseconds, wake}, {'REPLAY', id, microseconds}, {'KEY_REUSED'}, {'ASK_KEY'}, {'NEED_SEED'}, {'FULL'}, {'USER_FULL'},
-- {'TOO_MANY', for how long (ms)}, or {'TAKEN'}: reserve another id (the shard's clock was lost and set back since,
-- and this one was given twice, or would be: only below its entry's id do `committed` and Postgres know that it is taken).
-- Run twice by one call it appends once.
local made = redis.call('HMGET', KEYS[5], 's', 'r')
if made[1] and made[2] == ARGV[12] then return {'OK', ARGV[3], made[1], 0} end
if made[1] or tonumber(ARGV[3]) <= tonumber(redis.call('GET', KEYS[10]) or '0') then return {'TAKEN'} end

local key = ARGV[5]
if key ~= '' then
  local used = redis.call('HMGET', KEYS[7], key, '*', '?')
  if used[1] then
    local id, created, hash = string.match(used[1], '^(%d+):(%d+):(.*)$')
    if hash ~= ARGV[6] then return {'KEY_REUSED'} end
    return {'REPLAY', id, created}
  end
  if not used[2] and used[3] ~= ARGV[10] then return {'ASK_KEY'} end
end

local counted = redis.call('MGET', KEYS[2], KEYS[3], KEYS[11])
local wait = has_to_wait(KEYS[11], counted[3], ARGV[13], DAY_MS)
if wait then return {'TOO_MANY', wait} end
local last_tick, held_bytes = counted[1], tonumber(counted[2] or '0')
if not last_tick then return {'NEED_SEED'} end
if tonumber(ARGV[3]) >= (last_tick + 1) * SLOTS then return {'TAKEN'} end
local size = entry_size(ARGV[4], key, ARGV[6])
local full = no_room(held_bytes, KEYS[9], ARGV[2], size, ARGV[8], ARGV[11])
if full then return {full} end

local now = server_microseconds()
local entry, tick = next_id(tonumber(last_tick), tonumber(ARGV[1]), now)
if not append_entry(KEYS[1], entry, ARGV[2], 'c', now, ARGV[4], key, ARGV[6]) then return {'NEED_SEED'} end
count_entries(KEYS[2], KEYS[3], KEYS[9], ARGV[2], tick, held_bytes, size)
now = int(now)
count(KEYS[11], ARGV[13], DAY_MS, 1)
redis.call('HSET', KEYS[5], 'u', ARGV[2], 't', ARGV[7], 's', now, 'a', now, 'm', '0', 'l', int(entry), 'w', '1', 'k', '1', 'r', ARGV[12])
redis.call('ZADD', KEYS[6], int(entry), ARGV[3])
if key ~= '' then
  redis.call('HSET', KEYS[7], key, ARGV[3] .. ':' .. now .. ':' .. ARGV[6])
end
redis.call('PERSIST', KEYS[7])
tell(KEYS[8], 'conversation', ARGV[3], ARGV[7], now, now)
return {'OK', ARGV[3], now, ask_for_flush(KEYS[1], KEYS[4], ARGV[9])}
