-- Appends a new title to the pending log.
-- KEYS 1 log  2 clock  3 bytes  4 wake  5 conversation  6 messages  7 retry keys  8 changed  9 events  10 users
-- ARGV 1 shard  2 user  3 conversation id  4 body  5 title  6 backlog limit (bytes)  7 wake lease (ms)  8 the user's limit (bytes)
-- Answers {'OK', created, last activity, wake}, {'UNKNOWN'}, {'NOT_FOUND'}, {'NEED_SEED'}, {'FULL'} or {'USER_FULL'}.
local known = redis.call('HMGET', KEYS[5], 'u', 'd', 'l', 's', 'a', 'm')
if known[1] ~= ARGV[2] then return {'UNKNOWN'} end  -- also somebody else's: nobody may learn which ids there are, not even while Postgres is away
if known[2] == '1' then return {'NOT_FOUND'} end
local counted = redis.call('MGET', KEYS[2], KEYS[3])
local last_tick, held_bytes = counted[1], tonumber(counted[2] or '0')
if not last_tick then return {'NEED_SEED'} end
local size = entry_size(ARGV[4], '', '')
local full = no_room(held_bytes, KEYS[10], ARGV[2], size, ARGV[6], ARGV[8])
if full then return {full} end

local now = server_microseconds()
local entry, tick = next_id(tonumber(last_tick), tonumber(ARGV[1]), now)
if entry <= tonumber(known[6]) then return {'NEED_SEED'} end  -- Postgres is ahead of this clock, as in append.lua
if not append_entry(KEYS[1], entry, ARGV[2], 'r', now, ARGV[4], '', '') then return {'NEED_SEED'} end
count_entries(KEYS[2], KEYS[3], KEYS[10], ARGV[2], tick, held_bytes, size)
redis.call('HSET', KEYS[5], 't', ARGV[5], 'l', int(entry))
if known[3] == '0' then
  redis.call('PERSIST', KEYS[5])
  redis.call('PERSIST', KEYS[6])
  redis.call('PERSIST', KEYS[7])
end
redis.call('ZADD', KEYS[8], int(entry), ARGV[3])
tell(KEYS[9], 'conversation', ARGV[3], ARGV[5], known[4], known[5])
return {'OK', known[4], known[5], ask_for_flush(KEYS[1], KEYS[4], ARGV[7])}
