-- COMMIT: makes an output the job's result, once. A worker that lost its lease loses the comparison of fences.
-- ARGV: job id, fence, output, timings, params, inputs (JSON), sha256 of the weights or "", how its model
-- was run otherwise than plainly (JSON) or "", then pairs of what was measured and seconds: a name of `server/eta.py`. Returns ok | cancelled | lost
local job = load_job(ARGV[1])
if job.status == "succeeded" and job.fence == ARGV[2] then return "ok" end
if not holds(job, ARGV[2]) then return "lost" end
-- The cancel came first and was acknowledged, so it wins.
if job.cancel == "1" then
  settle_cancelled(job)
  return "cancelled"
end
redis.call("HSET", job_key(job.id), "output", ARGV[3], "timings", ARGV[4], "params", ARGV[5], "inputs", ARGV[6])
if ARGV[7] ~= "" then redis.call("HSET", job_key(job.id), "weights_sha256", ARGV[7]) end
if ARGV[8] ~= "" then redis.call("HSET", job_key(job.id), "optimizations", ARGV[8]) end
settle(job, "succeeded")
-- Who took the names for a stray's, under the same fence before the ledger was set back, does not take the result.
redis.call("ZREM", trash_key, "outputs/" .. cjson.decode(ARGV[3]).key, "outputs/" .. job.id .. "/" .. job.fence .. "/")

-- What runs took lately decides on what the next ones will take: each new one counts a fifth.
for i = 9, #ARGV, 2 do
  local before = tonumber(redis.call("HGET", speed_key(job.model), ARGV[i]))
  local seconds = before and 0.8 * before + 0.2 * tonumber(ARGV[i + 1]) or tonumber(ARGV[i + 1])
  redis.call("HSET", speed_key(job.model), ARGV[i], string.format("%.6g", seconds))
  redis.call("PEXPIRE", speed_key(job.model), MODELS_KEPT_MS)
end
return "ok"
