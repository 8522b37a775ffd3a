-- FAIL: the job cannot be done. Returns ok | cancelled (a cancel came first) | lost
-- ARGV: job id, fence, code, detail, timings (JSON)
local job = load_job(ARGV[1])
if job.status == "failed" and job.fence == ARGV[2] then return "ok" end
if job.status == "cancelled" and job.fence == ARGV[2] then return "cancelled" end
if not holds(job, ARGV[2]) then return "lost" end
redis.call("HSET", job_key(job.id), "timings", ARGV[5])
if job.cancel == "1" then
  settle_cancelled(job)
  return "cancelled"
end
settle_failed(job, ARGV[3], ARGV[4])
return "ok"
