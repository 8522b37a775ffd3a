-- READ_BATCH: a batch and its jobs in one round trip.
-- ARGV: batch id. Returns {} when unknown, else {batch fields, {job fields, queue position or ""}, ...}
local batch = redis.call("HGETALL", batch_key(ARGV[1]))
if #batch == 0 then return {} end
local reply = { batch }
for _, id in ipairs(redis.call("LRANGE", batch_jobs_key(ARGV[1]), 0, -1)) do
  local fields = redis.call("HGETALL", job_key(id))
  local job = load_job(id)
  local rank = job.status == "queued" and redis.call("ZRANK", ready_key(job.model, job.priority, job.owner), id)
  reply[#reply + 1] = { fields, rank and rank + 1 or "" }
end
return reply
