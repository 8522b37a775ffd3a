-- START: says whether the job is on the device now, so that only such a job is suspected when its process dies.
-- ARGV: job id, fence, 1 or 0. Returns ok | cancelled | lost
local job = load_job(ARGV[1])
if not holds(job, ARGV[2]) then return "lost" end
redis.call("HSET", job_key(job.id), "on_device", ARGV[3])
if job.cancel == "1" then return "cancelled" end
return "ok"
