-- Gives a shard its clock back, from the highest id that Postgres knows, or that the log has held. The highest wins, so that several may do
-- it at once. Not from what Postgres knew before Redis was emptied once more: ids that were given in between may be committed since.
-- KEYS 1 clock  2 committed  3 log  4 seeding
-- ARGV 1 token (seed_begin.lua)  2 highest committed id  3 how far ahead of the server's clock an id may be (ms)
-- Answers {'OK'}, or {'LATE'}: the token is gone, with what Redis held, with its time, or because another was faster.
if redis.call('GET', KEYS[4]) ~= ARGV[1] then return {'LATE'} end
redis.call('DEL', KEYS[4])
local highest = tonumber(ARGV[2])
local tick = math.floor(highest / SLOTS)
if redis.call('EXISTS', KEYS[3]) == 1 then
  local info, held_last = redis.call('XINFO', 'STREAM', KEYS[3]), 0
  for i = 1, #info, 2 do
    if info[i] == 'last-generated-id' then held_last = math.floor(string.match(info[i + 1], '^%d+') / SLOTS) end
  end
  local latest = (server_microseconds() - EPOCH + ARGV[3] * 1000) / TICK
  if held_last <= math.max(tick, latest) then
    tick = math.max(tick, held_last)
  elseif redis.call('XLEN', KEYS[3]) == 0 then
    -- No append gives such an id: it was planted, and nothing can be appended behind it. Now that it is flushed the log begins anew.
    redis.call('DEL', KEYS[3])
  end
end
if tonumber(redis.call('GET', KEYS[1]) or '-1') < tick then redis.call('SET', KEYS[1], int(tick)) end
if tonumber(redis.call('GET', KEYS[2]) or '-1') < highest then redis.call('SET', KEYS[2], ARGV[2]) end
return {'OK'}
