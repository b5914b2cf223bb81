-- Whether the caller is to send the flush of a shard: nobody else has been told to.
-- KEYS 1 log  2 wake
-- ARGV 1 wake lease (ms)
return ask_for_flush(KEYS[1], KEYS[2], ARGV[1])
