-- START: says whether the job is on the device now, so that only such a job is suspected when its process dies. The one
-- that was there before may leave it in the same call.
-- ARGV: job id, fence, 1 or 0, then, if one leaves, its id and fence. Returns ok | cancelled | lost
if ARGV[4] and holds(load_job(ARGV[4]), ARGV[5]) then redis.call("HSET", job_key(ARGV[4]), "on_device", 0) end
local job = load_job(ARGV[1])
if not holds(job, ARGV[2]) then return "lost" end
redis.call("HSET", job_key(job.id), "on_device", ARGV[3])
if job.cancel == "1" then return "cancelled" end
return "ok"
