-- FINISH_MARKED: after the ledger was set back to an older copy, a job that the store marks as done is done again, as
-- COMMIT would have it.
-- ARGV: job id, batch id, owner, fence, attempts, worker or "", started, finished (ms), output, timings, params, inputs
-- (JSON), sha256 of the weights or "", optimizations (JSON) or "". Returns finished | done | differs (batch, owner or
-- photos are not the job's) | newer (it was claimed again more often) | held (a worker or the janitor may be at its
-- result) | cancelling | settled (failed or cancelled meanwhile) | unknown
local job = load_job(ARGV[1])
local fence, marked_fence = tonumber(job.fence), tonumber(ARGV[4])
if not job.status then return "unknown" end
if job.status == "succeeded" then return "done" end
if job.status ~= "queued" and job.status ~= "running" then return "settled" end
if job.batch_id ~= ARGV[2] or job.owner ~= ARGV[3] then return "differs" end
if fence > marked_fence then return "newer" end
if job.cancel == "1" then return "cancelling" end

local function names_of(inputs)
  local names = {}
  for i, input in ipairs(cjson.decode(inputs)) do names[i] = input.upload_id .. " " .. input.etag end
  return table.concat(names, "\n")
end
if names_of(redis.call("HGET", job_key(job.id), "inputs")) ~= names_of(ARGV[12]) then return "differs" end
-- Another worker with the same fence, and so the same key, writes its own bytes over the result, and deletes them when it
-- hears that it lost; so it may long after its lease. The worker that left the mark has nothing left to write, unless it
-- has claimed the job once more.
local lease = redis.call("ZSCORE", leases_key, job.id)
local is_leased = lease and tonumber(lease) > now
if job.status == "running" and fence == marked_fence and (job.worker ~= ARGV[6] or is_leased) then return "held" end
-- A janitor that has taken a name deletes what bears it; it has a minute for that, and the name is then due again.
local output = cjson.decode(ARGV[9])
local names = { "outputs/" .. job.id .. "/" .. ARGV[4] .. "/", "outputs/" .. output.key }
for _, name in ipairs(names) do
  local due = redis.call("ZSCORE", trash_key, name)
  if due and tonumber(due) <= now + 60000 then return "held" end
end

if job.status == "queued" then remove_ready(job) end
if job.status == "running" and fence < marked_fence then throw_away_try(job) end
-- A try that was taken back since the copy was made has left the result's name there.
redis.call("ZREM", trash_key, marker_name(job.id), unpack(names))

local key = job_key(job.id)
redis.call("HSET", key, "fence", ARGV[4], "attempts", math.max(tonumber(job.attempts), tonumber(ARGV[5])), "worker",
  ARGV[6], "started_at", ARGV[7], "output", ARGV[9], "timings", ARGV[10], "params", ARGV[11], "inputs", ARGV[12])
if ARGV[13] ~= "" then redis.call("HSET", key, "weights_sha256", ARGV[13]) end
if ARGV[14] ~= "" then redis.call("HSET", key, "optimizations", ARGV[14]) end
redis.call("HDEL", key, "error_code", "error_detail")
job.error_code = nil
job.attempts = redis.call("HGET", key, "attempts")

-- What CLAIM would have done to the batch.
local batch = load(batch_key(job.batch_id), { "status", "started_at" })
set_batch_status(job.batch_id, batch.status, "running")
if not batch.started_at then redis.call("HSET", batch_key(job.batch_id), "started_at", ARGV[7]) end
settle(job, "succeeded")
redis.call("HSET", key, "finished_at", digits(math.min(now, tonumber(ARGV[8]))))
return "finished"
