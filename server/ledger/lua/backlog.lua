-- BACKLOG: what waits for each model, who else holds it, and how long its runs take.
-- ARGV: worker id (not counted among the holders), name under which COMMIT keeps the seconds of a run, models...
-- Returns a JSON array: the version that PLACE compares, then for each model
-- [number ready, oldest age in ms, number of other holders, seconds of a run or false]
local reply = { redis.call("GET", placement_key) or "0" }
for i = 3, #ARGV do
  local model = ARGV[i]
  local num_ready, oldest = 0, now_micros
  for _, priority in ipairs(PRIORITIES) do
    for _, owner in ipairs(redis.call("ZRANGE", turns_key(model, priority), 0, -1)) do
      local ready = ready_key(model, priority, owner)
      num_ready = num_ready + redis.call("ZCARD", ready)
      local first = redis.call("ZRANGE", ready, 0, 0, "WITHSCORES")
      if first[2] then oldest = math.min(oldest, tonumber(first[2])) end
    end
  end
  local num_others = redis.call("ZCOUNT", holders_key(model), "(" .. now, "+inf")
  if tonumber(redis.call("ZSCORE", holders_key(model), ARGV[1]) or 0) > now then num_others = num_others - 1 end
  local seconds = redis.call("HGET", speed_key(model), ARGV[2])
  reply[i - 1] = { num_ready, math.floor((now_micros - oldest) / 1000), num_others, seconds and tonumber(seconds) }
end
return cjson.encode(reply)
