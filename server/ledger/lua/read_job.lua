-- READ_JOB: one job in one round trip. ARGV: job id. Returns {} when unknown, else {job fields, queue position or ""}
local fields = redis.call("HGETALL", job_key(ARGV[1]))
if #fields == 0 then return {} end
local job = load_job(ARGV[1])
local rank = job.status == "queued" and redis.call("ZRANK", ready_key(job.model, job.priority, job.owner), ARGV[1])
return { fields, rank and rank + 1 or "" }
