-- REOPEN: a user's retry. Failed and cancelled jobs are queued again with a fresh error budget; a batch that had finished
-- begins a new round.
-- ARGV: token, owner ("" for any), most open jobs, an owner of whose jobs fewer may be open or "", how many, job ids...
-- Returns queued | open (queued or running already) | succeeded | expired (its photos are gone) | unknown | full |
-- owner_full for each
local earlier = earlier_reply(ARGV[1])
if earlier then return earlier end
local owner, max_open, limited, max_limited_open = ARGV[2], tonumber(ARGV[3]), ARGV[4], tonumber(ARGV[5])

local function judge(job)
  if not job.status or (owner ~= "" and job.owner ~= owner) then return "unknown" end
  if job.status == "queued" or job.status == "running" then return "open" end
  if job.status == "succeeded" then return "succeeded" end
  if redis.call("HGET", batch_key(job.batch_id), "inputs_released") then return "expired" end
  return "queued"
end

local num_wanted, num_limited, is_counted = 0, 0, {}
for i = 6, #ARGV do
  local job = load_job(ARGV[i])
  if not is_counted[ARGV[i]] and judge(job) == "queued" then
    num_wanted = num_wanted + 1
    if job.owner == limited then num_limited = num_limited + 1 end
  end
  is_counted[ARGV[i]] = true
end
-- All of them are queued again or none is.
local refusal = nil
if redis.call("SCARD", open_key) + num_wanted > max_open then
  refusal = "full"
elseif num_limited > 0 and not has_room(limited, num_limited, max_limited_open) then
  refusal = "owner_full"
end

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
  note_open(job.owner, job.id)
  move_count(job.batch_id, job.status, "queued")
  make_ready(job)
  ring(job.model)
  tell_job(job, "job.retrying", "queued")
end

local replies, models, is_told, has_high = {}, {}, {}, false
for i = 6, #ARGV do
  local job = load_job(ARGV[i])
  local answer = judge(job)
  if answer == "queued" and refusal then
    answer = refusal
  elseif answer == "queued" then
    reopen(job, digits(now_micros + i))
    if not is_told[job.model] then models[#models + 1] = job.model end
    is_told[job.model], has_high = true, has_high or job.priority == "high"
  end
  replies[#replies + 1] = answer
end
if #models > 0 then tell_workers_ready(has_high, models) end
return keep_reply(ARGV[1], replies)
