-- PLACE: a worker will load a model, and others leave its memory for it: if nobody has placed one since it looked.
-- So of two workers that see the same need one moves, and the other looks again. A call that is repeated with the same
-- token after a lost reply gets the first one again.
-- ARGV: worker id, token, version that BACKLOG told, ms until the worker is no holder without an announcement, model to
-- load, models that leave...
-- Returns placed | stale
local worker_id, token, version, forget_ms = ARGV[1], ARGV[2], ARGV[3], tonumber(ARGV[4])
local earlier = earlier_reply(token)
if earlier then return earlier end
if (redis.call("GET", placement_key) or "0") ~= version then return "stale" end
redis.call("INCR", placement_key)
redis.call("PEXPIRE", placement_key, MODELS_KEPT_MS)
note_holder(ARGV[5], worker_id, now + forget_ms)
for i = 6, #ARGV do redis.call("ZREM", holders_key(ARGV[i]), worker_id) end
return keep_reply(token, "placed")
