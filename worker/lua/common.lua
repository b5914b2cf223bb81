-- Put before every script. Lua builds no key: all it touches comes in KEYS. Bodies are opaque bytes.
-- Numbers stay below 2^53, where a double is exact; they are written with %d because tostring() rounds at 14 digits, and %.0f takes twice as
-- long (2 of an append's 27 µs). It cuts off what stands behind the point.

local function int(number)
  return string.format('%d', number)
end

local function server_microseconds()
  local now = redis.call('TIME')
  return now[1] * 1000000 + now[2]
end

-- The next id of a shard: never below what it gave before, whatever the server's clock does.
local function next_id(last_tick, shard, microseconds)
  local tick = math.floor((microseconds - EPOCH) / TICK)
  if tick <= last_tick then tick = last_tick + 1 end
  return tick * SLOTS + shard, int(tick)
end

-- Whether somebody holds a lease. One with more than `longest_ms` to go was given before the server's clock was set back: it is nobody's.
local function held(lease, longest_ms)
  local left = redis.call('PTTL', lease)
  return left > 0 and left <= tonumber(longest_ms)
end

-- Appends one entry; `...` are further fields. It comes before any other write: a script that is over `maxmemory` fails at its first growing
-- one, before anything changed. `count_entries` comes behind the last one of a call.
-- False, and nothing written, if the log already holds a higher id (its clock is behind: seed it).
local function append_entry(log, id, user, kind, microseconds, body, key, extra, ...)
  local added = redis.pcall('XADD', log, int(id) .. '-0', 'k', kind, 'u', user, 't', int(microseconds), 'b', body, 'x', key, 'a', extra, ...)
  if type(added) == 'table' and added.err then
    if string.find(added.err, 'equal or smaller', 1, true) or string.find(added.err, 'last possible ID', 1, true) then return false end
    error(added.err)
  end
  return true
end

-- Notes what was appended: the clock as it stands now, and the bytes that are held, of which there were `held` before.
local function count_entries(clock, bytes, users, user, tick, held, size)
  redis.call('MSET', clock, tick, bytes, int(held + size))
  redis.call('HINCRBY', users, user, size)
end

-- What an entry counts for in the backlog: its fields, and about what the stream and the shard's other keys add to it.
local function entry_size(body, key, extra)
  return #body + #key + #extra + OVERHEAD
end

-- Whether there is room for an entry where `held` bytes are: 'FULL' for nobody, 'USER_FULL' not for this user, who holds a fair share
-- already; nil if there is.
local function no_room(held, users, user, size, limit, user_limit)
  if held + size > tonumber(limit) then return 'FULL' end
  if tonumber(redis.call('HGET', users, user) or '0') + size > tonumber(user_limit) then return 'USER_FULL' end
end

-- How often a user may do something in a window of time; 0: as often as he likes. The counter ends with the window, and nothing else does.
-- One with more than the window to go was begun before the server's clock was set back: it is nobody's.
local MINUTE_MS, DAY_MS = 60000, 86400000
local function left_of(counter, window_ms)
  local left = redis.call('PTTL', counter)
  return left > 0 and left <= window_ms and left or nil
end

-- How long he has to wait (ms) who did it `times` times; nil if he need not.
local function has_to_wait(counter, times, most, window_ms)
  if most == '0' or tonumber(times or '0') < tonumber(most) then return nil end
  return left_of(counter, window_ms)
end

local function count(counter, most, window_ms, times)
  if most == '0' then return end
  local often = redis.call('INCRBY', counter, times)
  -- More than he might have begun with, and yet he did not have to wait: see left_of.
  if often == times or often - times >= tonumber(most) then redis.call('SET', counter, times, 'PX', window_ms) end
end

-- 1 for the first entry since the last flush began: the caller then sends the flush task. Asked again when the lease runs out, because the
-- task may be lost; the lease grows with the age of the log, so that an hour without a worker does not leave an hour of tasks.
local function ask_for_flush(log, wake, lease_ms)
  if held(wake, LONGEST_LEASE_MS) then return 0 end
  local oldest = redis.call('XRANGE', log, '-', '+', 'COUNT', 1)[1]
  local born = oldest and string.match(oldest[1], '^%d+')
  local waited_ms = born and (server_microseconds() - EPOCH - math.floor(born / SLOTS) * TICK) / 1000 or 0
  redis.call('SET', wake, '1', 'PX', int(math.max(lease_ms, math.min(waited_ms / 2, LONGEST_LEASE_MS))))
  return 1
end

-- Tells a user's open pages what happened; the stream is there only while somebody reads it (`worker/events.py`). What it tells of is done
-- by now, so nothing here may fail the script.
local function tell(events, name, a, b, c, d)
  if redis.call('EXISTS', events) == 0 then return end
  redis.pcall('XADD', events, 'MAXLEN', '~', EVENTS_KEPT, '*', 'e', name, 'a', a, 'b', b, 'c', c, 'd', d)
end

-- Whether an event of a reply is its last.
local function is_end(entry)
  return entry[2][6] == '1'
end
