-- CLAIM: the best ready job of the given models: priority, then the owners in turn, then age.
-- ARGV: worker id, claim token, lease in ms, number of jobs the worker holds, 1 for `high` jobs only or 0, models...
-- Returns {"none"} | {"alone"} (a suspect is next and must run alone: come back with empty hands) | {"job", field, value, ...}
local worker_id, token, lease_ms, num_held = ARGV[1], ARGV[2], tonumber(ARGV[3]), tonumber(ARGV[4])
local high_only = ARGV[5] == "1"

local function reply(id)
  local fields = redis.call("HGETALL", job_key(id))
  table.insert(fields, 1, "job")
  return fields
end

-- A claim repeated after a lost reply gets the same job again.
local last = load(worker_key(worker_id) .. ":claim", { "token", "job_id" })
if last.token == token then
  local job = load_job(last.job_id)
  if job.status == "running" and job.worker == worker_id then return reply(job.id) end
  return { "none" }
end

local function head(model, priority, owner) return redis.call("ZRANGE", ready_key(model, priority, owner), 0, 0, "WITHSCORES") end

local function best(priority)
  local chosen
  for i = 6, #ARGV do
    local model = ARGV[i]
    local first = redis.call("ZRANGE", turns_key(model, priority), 0, 0, "WITHSCORES")
    if first[1] then
      local job = head(model, priority, first[1])
      local candidate = { model = model, owner = first[1], turn = tonumber(first[2]), id = job[1], order = tonumber(job[2]) }
      if not chosen or candidate.turn < chosen.turn
        or (candidate.turn == chosen.turn and candidate.order < chosen.order) then
        chosen = candidate
      end
    end
  end
  return chosen
end

for _, priority in ipairs(high_only and { "high" } or PRIORITIES) do
  local chosen = best(priority)
  if chosen then
    local job = load_job(chosen.id)
    if job.suspect == "1" and num_held > 0 then return { "alone" } end

    remove_ready(job)
    -- Whoever was served goes to the end of the line in each of the models that this worker serves, with one turn for all.
    local lines = {}
    for i = 6, #ARGV do lines[#lines + 1] = turns_key(ARGV[i], priority) end
    local turn = next_turn(lines)
    for _, turns in ipairs(lines) do
      if redis.call("ZSCORE", turns, job.owner) then redis.call("ZADD", turns, turn, job.owner) end
    end

    local key = job_key(job.id)
    job.attempts = redis.call("HINCRBY", key, "attempts", 1)
    redis.call("HINCRBY", key, "fence", 1)
    redis.call("HSET", key, "status", "running", "worker", worker_id, "started_at", now, "on_device", 0)
    redis.call("HDEL", key, "step", "total_steps", "error_code", "error_detail")
    job.error_code = nil
    redis.call("ZADD", leases_key, now + lease_ms, job.id)
    move_count(job.batch_id, "queued", "running")
    local batch = load(batch_key(job.batch_id), { "status", "started_at" })
    set_batch_status(job.batch_id, batch.status, "running")
    if not batch.started_at then redis.call("HSET", batch_key(job.batch_id), "started_at", now) end
    tell_job(job, "job.started", "running")

    local claim = worker_key(worker_id) .. ":claim"
    redis.call("HSET", claim, "token", token, "job_id", job.id)
    redis.call("PEXPIRE", claim, 60000)
    return reply(job.id)
  end
end
return { "none" }
