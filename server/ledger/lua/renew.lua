-- RENEW: longer leases and progress for all jobs that a worker holds. A lease that ran out but that nobody took is revived.
-- ARGV: lease in ms, then job id, fence, step, total steps ("" when not known) for each job. Returns ok | cancelled | lost for each
local lease_ms = tonumber(ARGV[1])
local replies = {}
for i = 2, #ARGV, 4 do
  local job = load_job(ARGV[i])
  if not holds(job, ARGV[i + 1]) then
    replies[#replies + 1] = "lost"
  else
    redis.call("ZADD", leases_key, now + lease_ms, job.id)
    if ARGV[i + 2] ~= "" and redis.call("HGET", job_key(job.id), "step") ~= ARGV[i + 2] then
      redis.call("HSET", job_key(job.id), "step", ARGV[i + 2], "total_steps", ARGV[i + 3])
      announce_change(job.batch_id)
    end
    replies[#replies + 1] = job.cancel == "1" and "cancelled" or "ok"
  end
end
return replies
