-- COMMIT: makes an output the job's result, once. A worker that lost its lease loses the comparison of fences.
-- ARGV: job id, fence, output, timings, params, inputs (JSON). Returns ok | cancelled | lost
local job = load_job(ARGV[1])
if job.status == "succeeded" and job.fence == ARGV[2] then return "ok" end
if not holds(job, ARGV[2]) then return "lost" end
-- The cancel came first and was acknowledged, so it wins.
if job.cancel == "1" then
  settle_cancelled(job)
  return "cancelled"
end
redis.call("HSET", job_key(job.id), "output", ARGV[3], "timings", ARGV[4], "params", ARGV[5], "inputs", ARGV[6])
settle(job, "succeeded")
return "ok"
