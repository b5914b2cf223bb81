-- Appends a deletion to the pending log and leaves a tombstone, so that neither a read nor a late write finds the conversation again.
-- KEYS 1 log  2 clock  3 bytes  4 wake  5 conversation  6 messages  7 retry keys  8 changed  9 turn  10 events  11 users
-- ARGV 1 shard  2 user  3 conversation id  4 body  5 wake lease (ms)
-- Answers {'OK', wake}, {'UNKNOWN'}, {'NOT_FOUND'} or {'NEED_SEED'}. A full backlog does not stop it: it is what frees space.
local known = redis.call('HMGET', KEYS[5], 'u', 'd')
if known[1] ~= ARGV[2] then return {'UNKNOWN'} end  -- also somebody else's: nobody may learn which ids there are, not even while Postgres is away
if known[2] == '1' then return {'NOT_FOUND'} end
local counted = redis.call('MGET', KEYS[2], KEYS[3])
local last_tick, held_bytes = counted[1], tonumber(counted[2] or '0')
if not last_tick then return {'NEED_SEED'} end

local now = server_microseconds()
local entry, tick = next_id(tonumber(last_tick), tonumber(ARGV[1]), now)
if not append_entry(KEYS[1], entry, ARGV[2], 'd', now, ARGV[4], '', '') then return {'NEED_SEED'} end
count_entries(KEYS[2], KEYS[3], KEYS[11], ARGV[2], tick, held_bytes, entry_size(ARGV[4], '', ''))
redis.call('HSET', KEYS[5], 'd', '1', 't', '', 'l', int(entry))
redis.call('PERSIST', KEYS[5])
redis.call('DEL', KEYS[6], KEYS[7], KEYS[9])
redis.call('ZADD', KEYS[8], int(entry), ARGV[3])
tell(KEYS[10], 'conversation_deleted', ARGV[3], '', '', '')
return {'OK', ask_for_flush(KEYS[1], KEYS[4], ARGV[5])}
