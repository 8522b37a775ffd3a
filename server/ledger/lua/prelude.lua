-- Shared by every script: key names, the clock, and the few moves from which all changes of state are made.
-- KEYS[1] is the key prefix, KEYS[2] Dramatiq's namespace. Only the server's clock is used: workers' clocks differ.

local prefix = KEYS[1]
local dramatiq = KEYS[2]
local PRIORITIES = { "high", "normal", "low" }

local clock = redis.call("TIME")
local now_micros = clock[1] * 1000000 + clock[2]
local now = math.floor(now_micros / 1000)

local function job_key(id) return prefix .. ":job:" .. id end
local function batch_key(id) return prefix .. ":batch:" .. id end
local function batch_jobs_key(id) return prefix .. ":batch:" .. id .. ":jobs" end
local function events_key(id) return prefix .. ":batch:" .. id .. ":events" end
local function upload_key(id) return prefix .. ":upload:" .. id end
local function worker_key(id) return prefix .. ":worker:" .. id end
local function turns_key(model, priority) return prefix .. ":turns:" .. model .. ":" .. priority end
local function ready_key(model, priority, owner) return prefix .. ":ready:" .. model .. ":" .. priority .. ":" .. owner end
local leases_key = prefix .. ":leases"
local delayed_key = prefix .. ":delayed"
local open_key = prefix .. ":open"
local forget_key = prefix .. ":forget"
local changes_key = prefix .. ":changes"
local control_key = prefix .. ":control"

-- Lua prints large numbers as 1.7e+15; Redis and JSON want digits.
local function digits(number) return string.format("%.0f", number) end

local function load(key, names)
  local values = redis.call("HMGET", key, unpack(names))
  local record = {}
  for i, name in ipairs(names) do record[name] = values[i] or nil end
  return record
end

local JOB_FIELDS = {
  "status", "batch_id", "index", "owner", "model", "priority", "order", "fence", "attempts", "cancel", "on_device",
  "suspect", "errors", "deaths", "device_deaths", "worker", "error_code", "error_detail",
}
local function load_job(id)
  local job = load(job_key(id), JOB_FIELDS)
  job.id = id
  return job
end

-- The two streams are trimmed and expire by themselves: readers that were away longer take a fresh snapshot.
local function announce_change(batch_id)
  redis.call("XADD", changes_key, "MAXLEN", "~", 10000, "*", "batch_id", batch_id)
  redis.call("PEXPIRE", changes_key, 3600000)
end

local function tell(batch_id, kind, data)
  redis.call("XADD", events_key(batch_id), "MAXLEN", "~", 2000, "*", "type", kind, "data", cjson.encode(data))
  announce_change(batch_id)
end

local function tell_job(job, kind, status)
  local data = {
    job_id = job.id, index = tonumber(job.index), status = status,
    attempts = tonumber(job.attempts), error = cjson.null,
  }
  if job.error_code then data.error = { code = job.error_code, detail = job.error_detail or "" } end
  tell(job.batch_id, kind, data)
end

-- One message in the layout that Dramatiq 2.2 writes itself (brokers/redis/dispatch.lua, "enqueue").
-- So many bells wake every worker there is; where nobody listens, more would only pile up.
local MOST_BELLS = 100
local num_rung = 0
local function ring(model)
  if redis.call("LLEN", dramatiq .. ":" .. prefix .. "." .. model) >= MOST_BELLS then return end
  num_rung = num_rung + 1
  local id = digits(now_micros) .. "-" .. num_rung
  local queue = prefix .. "." .. model
  local message = cjson.encode({
    queue_name = queue, actor_name = "ring", args = { model }, kwargs = {},
    options = { redis_message_id = id }, message_id = id, message_timestamp = now,
  })
  redis.call("HSET", dramatiq .. ":" .. queue .. ".msgs", id, message)
  redis.call("RPUSH", dramatiq .. ":" .. queue, id)
end

-- The turn after every turn in the given lines. An owner who begins to wait takes it, so that nobody who waits already is
-- passed. It follows the clock, so that turns in different lines can be compared, but a clock set back is not followed.
local function next_turn(lines)
  local turn = now_micros
  for _, turns in ipairs(lines) do
    local last = redis.call("ZREVRANGE", turns, 0, 0, "WITHSCORES")
    if last[2] then turn = math.max(turn, tonumber(last[2]) + 1) end
  end
  return digits(turn)
end

local function make_ready(job)
  local turns = turns_key(job.model, job.priority)
  redis.call("ZADD", ready_key(job.model, job.priority, job.owner), job.order, job.id)
  if not redis.call("ZSCORE", turns, job.owner) then
    redis.call("ZADD", turns, next_turn({ turns }), job.owner)
  end
end

local function remove_ready(job)
  local ready = ready_key(job.model, job.priority, job.owner)
  redis.call("ZREM", ready, job.id)
  if redis.call("EXISTS", ready) == 0 then
    redis.call("ZREM", turns_key(job.model, job.priority), job.owner)
  end
end

local function move_count(batch_id, from, to)
  redis.call("HINCRBY", batch_key(batch_id), from, -1)
  redis.call("HINCRBY", batch_key(batch_id), to, 1)
end

local function finish_batch_if_done(batch_id)
  local batch = load(batch_key(batch_id), { "queued", "running", "records_ms", "round" })
  if tonumber(batch.queued) > 0 or tonumber(batch.running) > 0 then return end
  local expires = now + tonumber(batch.records_ms)
  redis.call("HSET", batch_key(batch_id), "status", "finished", "finished_at", now, "expires_at", expires)
  redis.call("ZADD", forget_key, expires, batch_id)
  tell(batch_id, "batch.finished", { batch_id = batch_id, round = tonumber(batch.round) })
end

-- The one way into `succeeded`, `failed` and `cancelled`.
local function settle(job, status)
  redis.call("HSET", job_key(job.id), "status", status, "finished_at", now, "on_device", 0, "cancel", 0)
  redis.call("ZREM", leases_key, job.id)
  redis.call("ZREM", delayed_key, job.id)
  redis.call("SREM", open_key, job.id)
  move_count(job.batch_id, job.status, status)
  tell_job(job, "job." .. status, status)
  finish_batch_if_done(job.batch_id)
end

local function set_error(job, code, detail)
  job.error_code, job.error_detail = code, detail
  redis.call("HSET", job_key(job.id), "error_code", code, "error_detail", detail)
end

local function settle_failed(job, code, detail)
  set_error(job, code, detail)
  settle(job, "failed")
end

local function settle_cancelled(job)
  job.error_code = nil
  redis.call("HDEL", job_key(job.id), "error_code", "error_detail")
  settle(job, "cancelled")
end

-- From `running` back to `queued`, at its old place in the line; due after `delay_ms`.
local function requeue(job, delay_ms)
  redis.call("HSET", job_key(job.id), "status", "queued", "on_device", 0)
  redis.call("HDEL", job_key(job.id), "step", "total_steps", "worker")
  redis.call("ZREM", leases_key, job.id)
  move_count(job.batch_id, "running", "queued")
  if delay_ms > 0 then
    redis.call("ZADD", delayed_key, now + delay_ms, job.id)
  else
    make_ready(job)
    ring(job.model)
  end
  tell_job(job, "job.retrying", "queued")
end

local function holds(job, fence) return job.status == "running" and job.fence == fence end
