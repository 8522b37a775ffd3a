-- REOPEN: a user's retry. Failed and cancelled jobs are queued again with a fresh error budget; the batch begins a new round.
-- ARGV: owner ("" for any), batch id, job ids... Returns the ids that were queued again
local batch_id = ARGV[2]
local batch = load(batch_key(batch_id), { "owner", "status", "round" })
if not batch.status or (ARGV[1] ~= "" and batch.owner ~= ARGV[1]) then return {} end

local reopened = {}
for i = 3, #ARGV do
  local job = load_job(ARGV[i])
  if job.batch_id == batch_id and (job.status == "failed" or job.status == "cancelled") then
    job.order = digits(now_micros + i)
    redis.call("HSET", job_key(job.id), "status", "queued", "queued_at", now, "order", job.order, "errors", 0,
      "deaths", 0, "device_deaths", 0, "suspect", 0, "cancel", 0)
    redis.call("HDEL", job_key(job.id), "error_code", "error_detail", "finished_at", "worker", "step", "total_steps")
    job.error_code = nil
    redis.call("SADD", open_key, job.id)
    move_count(batch_id, job.status, "queued")
    make_ready(job)
    ring(job.model)
    tell_job(job, "job.retrying", "queued")
    reopened[#reopened + 1] = job.id
  end
end

-- A batch that had not finished is still in its round; only a finished one begins another.
if #reopened > 0 and batch.status == "finished" then
  redis.call("HINCRBY", batch_key(batch_id), "round", 1)
  redis.call("HSET", batch_key(batch_id), "status", "queued")
  redis.call("HDEL", batch_key(batch_id), "finished_at", "expires_at")
  redis.call("ZREM", forget_key, batch_id)
end
return reopened
