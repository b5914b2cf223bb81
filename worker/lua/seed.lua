-- Gives a shard its clock back, from the highest id that Postgres knows, or that the log has held. The highest wins, so that it may run
-- twice and late.
-- KEYS 1 clock  2 committed  3 log
-- ARGV 1 highest committed id
local tick = math.floor(ARGV[1] / SLOTS)
if redis.call('EXISTS', KEYS[3]) == 1 then
  local info = redis.call('XINFO', 'STREAM', KEYS[3])
  for i = 1, #info, 2 do
    if info[i] == 'last-generated-id' then tick = math.max(tick, math.floor(string.match(info[i + 1], '^%d+') / SLOTS)) end
  end
end
if tonumber(redis.call('GET', KEYS[1]) or '-1') < tick then redis.call('SET', KEYS[1], int(tick)) end
if tonumber(redis.call('GET', KEYS[2]) or '-1') < tonumber(ARGV[1]) then redis.call('SET', KEYS[2], ARGV[1]) end
return {'OK'}
