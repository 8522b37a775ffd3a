-- Part of EXPIRE and DELETE_BATCH: how a batch's photos, results and records go.
-- Of FINISH_MARKED too, which needs a name only.

-- What a worker leaves beside a result (`server/marker.py`).
local function marker_name(job_id) return "outputs/" .. job_id .. "/done.json" end

local function for_each_job(batch_id, act)
  for _, id in ipairs(redis.call("LRANGE", batch_jobs_key(batch_id), 0, -1)) do act(id) end
end

-- The batch gives its photos back; those that nobody else needs go.
local function release_inputs(batch_id)
  redis.call("ZREM", inputs_due_key, batch_id)
  if redis.call("HSETNX", batch_key(batch_id), "inputs_released", 1) == 0 then return end
  for_each_job(batch_id, function(id)
    for _, input in ipairs(cjson.decode(redis.call("HGET", job_key(id), "inputs"))) do release_upload(input.upload_id) end
  end)
end

local function throw_away_outputs(batch_id)
  redis.call("ZREM", outputs_due_key, batch_id)
  for_each_job(batch_id, function(id)
    local output = redis.call("HGET", job_key(id), "output")
    if not output then return end
    throw_away("outputs/" .. cjson.decode(output).key, now)
    throw_away(marker_name(id), now)
    redis.call("HDEL", job_key(id), "output")
  end)
end

local function forget(batch_id)
  release_inputs(batch_id)
  throw_away_outputs(batch_id)
  for_each_job(batch_id, function(id) redis.call("DEL", job_key(id)) end)
  local batch = load(batch_key(batch_id), { "owner", "status", "round" })
  batch.id = batch_id
  for _, shelf in ipairs({ "all", batch.status, "has-succeeded", "has-failed", "has-cancelled" }) do
    take_off_shelf(batch, shelf)
  end
  for round = 1, tonumber(batch.round) do redis.call("ZREM", webhooks_key, batch_id .. ":" .. round) end
  redis.call("DEL", batch_key(batch_id), batch_jobs_key(batch_id), events_key(batch_id), deliveries_key(batch_id))
  redis.call("ZREM", forget_key, batch_id)
  announce_change(batch_id)
end
