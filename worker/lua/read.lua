-- Reads a conversation and a page of its cached messages, as they are at one instant. Writes nothing.
-- KEYS 1 conversation  2 messages  3 committed
-- ARGV 1 user  2 'before', 'after' or '' for no messages  3 from id or '' (exclusive)  4 count
-- Answers {'UNKNOWN'}, {'NOT_FOUND'} or {'OK', {title, created, last activity, last message id, whole}, ttl (ms), committed, {messages}, first cached id};
-- 'before' gives the newest first.
local known = redis.call('HMGET', KEYS[1], 'u', 'd', 't', 's', 'a', 'm', 'w', 'l')
if known[1] ~= ARGV[1] then return {'UNKNOWN'} end  -- also somebody else's: nobody may learn which ids there are, not even while Postgres is away
if known[2] == '1' then return {'NOT_FOUND'} end
-- Of a clean conversation everything is committed, also when the shard's own mark was lost with the rest of a wiped Redis.
local committed = known[8] == '0' and known[6] or redis.call('GET', KEYS[3]) or '0'
local page, first = {}, ''
if ARGV[2] == 'before' then
  page = redis.call('XREVRANGE', KEYS[2], ARGV[3] == '' and '+' or '(' .. ARGV[3] .. '-0', '-', 'COUNT', ARGV[4])
elseif ARGV[2] == 'after' then
  page = redis.call('XRANGE', KEYS[2], '(' .. ARGV[3] .. '-0', '+', 'COUNT', ARGV[4])
end
if ARGV[2] ~= '' then
  local oldest = redis.call('XRANGE', KEYS[2], '-', '+', 'COUNT', 1)
  if oldest[1] then first = oldest[1][1] end
end
return {'OK', {known[3], known[4], known[5], known[6], known[7]}, redis.call('PTTL', KEYS[1]), committed, page, first}
