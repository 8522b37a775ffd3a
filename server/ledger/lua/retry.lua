-- RETRY: a worker gives a job back. With `counts` it was the job's error and is tried a bounded number of times;
-- without, it was nobody's (a shutdown, a dependency that is away) and costs nothing.
-- ARGV: job id, fence, delay in ms, counts (1 or 0), code, detail, most errors. Returns ok | failed | cancelled | lost
local job = load_job(ARGV[1])
if not holds(job, ARGV[2]) then return "lost" end
if job.cancel == "1" then
  settle_cancelled(job)
  return "cancelled"
end
local delay_ms, counts, most_errors = tonumber(ARGV[3]), ARGV[4] == "1", tonumber(ARGV[7])
if counts and redis.call("HINCRBY", job_key(job.id), "errors", 1) >= most_errors then
  settle_failed(job, ARGV[5], ARGV[6])
  return "failed"
end
if counts then set_error(job, ARGV[5], ARGV[6]) end
requeue(job, delay_ms)
return "ok"
