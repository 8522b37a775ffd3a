-- FAIL_REMOVED: jobs wait in vain for a model that no registry and no live worker knows any more; once that has lasted
-- for a while, they fail, and can be retried when the model is back.
-- ARGV: ms that it must have lasted, most jobs a call, models of the caller's registry... Returns the number of jobs
local grace_ms, limit = tonumber(ARGV[1]), tonumber(ARGV[2])
local known = {}
for i = 3, #ARGV do known[ARGV[i]] = true end
for _, worker in ipairs(redis.call("SMEMBERS", workers_key)) do
  local models = redis.call("HGET", worker_key(worker), "models")
  for model in pairs(models and cjson.decode(models) or {}) do known[model] = true end
end

local num_failed = 0
local function fail_ready(model, priority)
  for _, owner in ipairs(redis.call("ZRANGE", turns_key(model, priority), 0, -1)) do
    if num_failed >= limit then return end
    local ids = redis.call("ZRANGE", ready_key(model, priority, owner), 0, limit - num_failed - 1)
    for _, id in ipairs(ids) do
      local job = load_job(id)
      remove_ready(job)
      settle_failed(job, "model_removed", "The model " .. model .. " was taken away before the job could run.")
      num_failed = num_failed + 1
    end
  end
end

if redis.call("SCARD", open_key) > 0 then redis.call("PEXPIRE", models_key, MODELS_KEPT_MS) end
for _, model in ipairs(redis.call("SMEMBERS", models_key)) do
  if known[model] then
    redis.call("HDEL", removed_key, model)
  else
    redis.call("HSETNX", removed_key, model, now)
    redis.call("PEXPIRE", removed_key, MODELS_KEPT_MS)
    if now - tonumber(redis.call("HGET", removed_key, model)) >= grace_ms then
      for _, priority in ipairs(PRIORITIES) do fail_ready(model, priority) end
    end
  end
end
return num_failed
