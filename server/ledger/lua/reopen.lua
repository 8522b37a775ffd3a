-- REOPEN: a user's retry. Failed and cancelled jobs are queued again with a fresh error budget; a batch that had finished
-- begins a new round.
-- ARGV: token, owner ("" for any), most open jobs, job ids...
-- Returns queued | open (queued or running already) | succeeded | expired (its photos are gone) | unknown | full for each
local earlier = earlier_reply(ARGV[1])
if earlier then return earlier end
local owner, max_open = ARGV[2], tonumber(ARGV[3])

local function judge(job)
  if not job.status or (owner ~= "" and job.owner ~= owner) then return "unknown" end
  if job.status == "queued" or job.status == "running" then return "open" end
  if job.status == "succeeded" then return "succeeded" end
  if redis.call("HGET", batch_key(job.batch_id), "inputs_released") then return "expired" end
  return "queued"
end

local num_wanted, is_counted = 0, {}
for i = 4, #ARGV do
  if not is_counted[ARGV[i]] and judge(load_job(ARGV[i])) == "queued" then num_wanted = num_wanted + 1 end
  is_counted[ARGV[i]] = true
end
local is_full = redis.call("SCARD", open_key) + num_wanted > max_open

local function begin_round(batch_id)
  redis.call("HINCRBY", batch_key(batch_id), "round", 1)
  set_batch_status(batch_id, "finished", "queued")
  redis.call("HDEL", batch_key(batch_id), "finished_at", "expires_at")
  for _, due in ipairs({ inputs_due_key, outputs_due_key, forget_key }) do redis.call("ZREM", due, batch_id) end
end

local function reopen(job, order)
  -- A batch that had not finished is still in its round; only a finished one begins another.
  if redis.call("HGET", batch_key(job.batch_id), "status") == "finished" then begin_round(job.batch_id) end
  job.order = order
  redis.call("HSET", job_key(job.id), "status", "queued", "queued_at", now, "order", order, "errors", 0, "deaths", 0,
    "device_deaths", 0, "suspect", 0, "cancel", 0)
  redis.call("HDEL", job_key(job.id), "error_code", "error_detail", "finished_at", "worker", "step", "total_steps")
  job.error_code = nil
  redis.call("SADD", open_key, job.id)
  move_count(job.batch_id, job.status, "queued")
  make_ready(job)
  ring(job.model)
  tell_job(job, "job.retrying", "queued")
end

local replies, models, is_told, has_high = {}, {}, {}, false
for i = 4, #ARGV do
  local job = load_job(ARGV[i])
  local answer = judge(job)
  if answer == "queued" and is_full then
    answer = "full"
  elseif answer == "queued" then
    reopen(job, digits(now_micros + i))
    if not is_told[job.model] then models[#models + 1] = job.model end
    is_told[job.model], has_high = true, has_high or job.priority == "high"
  end
  replies[#replies + 1] = answer
end
if #models > 0 then tell_workers_ready(has_high, models) end
return keep_reply(ARGV[1], replies)
