-- BACKLOG: what waits for each model. ARGV: models... Returns a JSON object {model: [number ready, oldest age in ms]}
local backlog = {}
for _, model in ipairs(ARGV) do
  local num_ready, oldest = 0, now_micros
  for _, priority in ipairs(PRIORITIES) do
    for _, owner in ipairs(redis.call("ZRANGE", turns_key(model, priority), 0, -1)) do
      local ready = ready_key(model, priority, owner)
      num_ready = num_ready + redis.call("ZCARD", ready)
      local first = redis.call("ZRANGE", ready, 0, 0, "WITHSCORES")
      if first[2] then oldest = math.min(oldest, tonumber(first[2])) end
    end
  end
  backlog[model] = { num_ready, math.floor((now_micros - oldest) / 1000) }
end
return cjson.encode(backlog)
