-- CANCEL: a queued job ends at once; a running one is asked to stop before its next step.
-- ARGV: token, owner ("" for any), job ids... Returns cancelled | requested | finished | unknown for each
local earlier = earlier_reply(ARGV[1])
if earlier then return earlier end

local replies = {}
for i = 3, #ARGV do
  local job = load_job(ARGV[i])
  local answer
  if not job.status or (ARGV[2] ~= "" and job.owner ~= ARGV[2]) then
    answer = "unknown"
  elseif job.status == "queued" then
    remove_ready(job)
    settle_cancelled(job)
    answer = "cancelled"
  elseif job.status == "running" then
    redis.call("HSET", job_key(job.id), "cancel", 1)
    tell_workers("type", "cancel", "job_id", job.id)
    answer = "requested"
  else
    answer = "finished"
  end
  replies[#replies + 1] = answer
end
return keep_reply(ARGV[1], replies)
