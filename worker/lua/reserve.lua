-- Takes the next id of a shard, for a conversation that is about to be created: its keys are named after it.
-- KEYS 1 clock
-- ARGV 1 shard
-- Answers {'OK', id} or {'NEED_SEED'}.
local last_tick = redis.call('GET', KEYS[1])
if not last_tick then return {'NEED_SEED'} end
local id, tick = next_id(tonumber(last_tick), tonumber(ARGV[1]), server_microseconds())
redis.call('SET', KEYS[1], tick)
return {'OK', int(id)}
