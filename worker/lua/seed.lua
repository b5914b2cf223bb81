-- Gives a shard its clock back, from the highest id that Postgres knows, or that the log has held. The highest wins, so that it may run
-- twice and late.
-- KEYS 1 clock  2 committed  3 log
-- ARGV 1 highest committed id  2 how far ahead of the server's clock an id may be (ms)
local highest = tonumber(ARGV[1])
local tick = math.floor(highest / SLOTS)
if redis.call('EXISTS', KEYS[3]) == 1 then
  local info, held_last = redis.call('XINFO', 'STREAM', KEYS[3]), 0
  for i = 1, #info, 2 do
    if info[i] == 'last-generated-id' then held_last = math.floor(string.match(info[i + 1], '^%d+') / SLOTS) end
  end
  local latest = (server_microseconds() - EPOCH + ARGV[2] * 1000) / TICK
  if held_last <= math.max(tick, latest) then
    tick = math.max(tick, held_last)
  elseif redis.call('XLEN', KEYS[3]) == 0 then
    -- No append gives such an id: it was planted, and nothing can be appended behind it. Now that it is flushed the log begins anew.
    redis.call('DEL', KEYS[3])
  end
end
if tonumber(redis.call('GET', KEYS[1]) or '-1') < tick then redis.call('SET', KEYS[1], int(tick)) end
if tonumber(redis.call('GET', KEYS[2]) or '-1') < highest then redis.call('SET', KEYS[2], ARGV[1]) end
return {'OK'}
