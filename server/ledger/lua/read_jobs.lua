-- READ_JOBS: jobs in one round trip. ARGV: job ids. Returns {job fields, queue position or ""} for each that is known
local replies = {}
for _, id in ipairs(ARGV) do
  local reply, job = job_reply(id)
  if job.id then replies[#replies + 1] = reply end
end
return replies
