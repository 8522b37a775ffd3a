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
local function deliveries_key(id) return prefix .. ":batch:" .. id .. ":deliveries" end
local function upload_key(id) return prefix .. ":upload:" .. id end
local function digest_key(owner, sha256) return prefix .. ":digest:" .. owner .. ":" .. sha256 end
local function shelf_key(scope, shelf) return prefix .. ":shelf:" .. scope .. ":" .. shelf end
local function speed_key(model) return prefix .. ":speed:" .. model end
local function weights_key(model) return prefix .. ":weights:" .. model end
local function served_key(model) return prefix .. ":served:" .. model end
local function reply_key(token) return prefix .. ":reply:" .. token end
local function worker_key(id) return prefix .. ":worker:" .. id end
local function holders_key(model) return prefix .. ":holders:" .. model end
local function turns_key(model, priority) return prefix .. ":turns:" .. model .. ":" .. priority end
local function ready_key(model, priority, owner) return prefix .. ":ready:" .. model .. ":" .. priority .. ":" .. owner end
local leases_key = prefix .. ":leases"
local delayed_key = prefix .. ":delayed"
local open_key = prefix .. ":open"
local function owner_open_key(owner) return prefix .. ":open:" .. owner end
local function tokens_key(bucket) return prefix .. ":tokens:" .. bucket end
local workers_key = prefix .. ":workers"
local models_key = prefix .. ":models"
local removed_key = prefix .. ":removed"
local unused_key = prefix .. ":unused"
local inputs_due_key = prefix .. ":inputs_due"
local outputs_due_key = prefix .. ":outputs_due"
local forget_key = prefix .. ":forget"
local trash_key = prefix .. ":trash"
local webhooks_key = prefix .. ":webhooks"
local changes_key = prefix .. ":changes"
local control_key = prefix .. ":control"
local placement_key = prefix .. ":placement"

-- How long is kept what only tells of models: measured speeds, weights that were seen, which were asked for.
local MODELS_KEPT_MS = 30 * 24 * 3600 * 1000

-- Lua prints large numbers as 1.7e+15; Redis and JSON want digits.
local function digits(number) return string.format("%.0f", number) end

-- A change that would say something else when it is done twice keeps its reply for a minute: a call that is repeated with
-- the same token after a lost reply gets the first one again.
local function earlier_reply(token)
  local reply = redis.call("GET", reply_key(token))
  return reply and cjson.decode(reply)
end

local function keep_reply(token, reply)
  redis.call("SET", reply_key(token), cjson.encode(reply), "PX", 60000)
  return reply
end

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

-- What all workers hear at once, and what still comes when they miss it: a cancel with RENEW, ready jobs with a bell.
local function tell_workers(...)
  redis.call("XADD", control_key, "MAXLEN", "~", 1000, "*", ...)
  redis.call("PEXPIRE", control_key, 3600000)
end

-- A bell wakes a worker within a poll of Dramatiq's; this does so at once. Workers with full hands need to hear only of
-- `high` jobs, and all of them only of models that they could serve: no id has a comma.
local function tell_workers_ready(has_high, models)
  tell_workers("type", "ready", "high", has_high and 1 or 0, "models", table.concat(models, ","))
end

-- When a worker last said that it could run jobs of a model. It outlives all workers by far, so that a model that nobody
-- serves any more is known from one that nobody has served yet.
local function note_served(model, ...)
  redis.call("SET", served_key(model), digits(now), "PX", MODELS_KEPT_MS, ...)
end

-- Who has a model in memory, or is about to: an entry that is not renewed runs out, and with the last of them the key.
local function note_holder(model, worker_id, due)
  redis.call("ZADD", holders_key(model), digits(due), worker_id)
  redis.call("PEXPIREAT", holders_key(model), digits(redis.call("ZREVRANGE", holders_key(model), 0, 0, "WITHSCORES")[2]))
end

-- One message in the layout that Dramatiq 2.2 writes itself (brokers/redis/dispatch.lua, "enqueue").
-- So many bells wake every worker there is; where nobody listens, more would only pile up.
local MOST_BELLS = 100
local num_rung = 0
local function ring(model, count)
  local queue = prefix .. "." .. model
  local room = MOST_BELLS - redis.call("LLEN", dramatiq .. ":" .. queue)
  local ids, messages = {}, {}
  for i = 1, math.min(count or 1, room) do
    num_rung = num_rung + 1
    local id = digits(now_micros) .. "-" .. num_rung
    ids[i] = id
    messages[2 * i - 1] = id
    messages[2 * i] = cjson.encode({
      queue_name = queue, actor_name = "ring", args = { model }, kwargs = {},
      options = { redis_message_id = id }, message_id = id, message_timestamp = now,
    })
  end
  if #ids == 0 then return end
  redis.call("HSET", dramatiq .. ":" .. queue .. ".msgs", unpack(messages))
  redis.call("RPUSH", dramatiq .. ":" .. queue, unpack(ids))
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

local function take_turn(turns, owner)
  if not redis.call("ZSCORE", turns, owner) then redis.call("ZADD", turns, next_turn({ turns }), owner) end
end

local function make_ready(job)
  redis.call("ZADD", ready_key(job.model, job.priority, job.owner), job.order, job.id)
  take_turn(turns_key(job.model, job.priority), job.owner)
end

local function remove_ready(job)
  local ready = ready_key(job.model, job.priority, job.owner)
  redis.call("ZREM", ready, job.id)
  if redis.call("EXISTS", ready) == 0 then
    redis.call("ZREM", turns_key(job.model, job.priority), job.owner)
  end
end

-- Shelves list batches by their age, newest last, once for their owner and once for everybody ("*"): all of them, those of
-- a status, and those that have at least one job of a status. So no list has to look at what it does not show.
local EVERYBODY = "*"
local function put_on_shelf(batch, shelf)
  redis.call("ZADD", shelf_key(batch.owner, shelf), batch.order, batch.id)
  redis.call("ZADD", shelf_key(EVERYBODY, shelf), batch.order, batch.id)
end

local function take_off_shelf(batch, shelf)
  redis.call("ZREM", shelf_key(batch.owner, shelf), batch.id)
  redis.call("ZREM", shelf_key(EVERYBODY, shelf), batch.id)
end

local function load_shelved(batch_id)
  local batch = load(batch_key(batch_id), { "owner", "order" })
  batch.id = batch_id
  return batch
end

local function move_count(batch_id, from, to)
  local num_from = redis.call("HINCRBY", batch_key(batch_id), from, -1)
  local num_to = redis.call("HINCRBY", batch_key(batch_id), to, 1)
  if num_from > 0 and num_to > 1 then return end
  local batch = load_shelved(batch_id)
  if num_from == 0 then take_off_shelf(batch, "has-" .. from) end
  if num_to == 1 then put_on_shelf(batch, "has-" .. to) end
end

local function set_batch_status(batch_id, from, to)
  if from == to then return end
  local batch = load_shelved(batch_id)
  redis.call("HSET", batch_key(batch_id), "status", to)
  take_off_shelf(batch, from)
  put_on_shelf(batch, to)
end

-- Open jobs are in two sets, that of all and that of their owner.
local function note_open(owner, ...)
  redis.call("SADD", open_key, ...)
  redis.call("SADD", owner_open_key(owner), ...)
end

-- Whether an owner may have so many more open. A process of an older version ends jobs without taking them out of their
-- owner's set, so before anybody is refused for them, they are taken out here.
local function has_room(owner, num_more, most)
  local mine = owner_open_key(owner)
  local num_mine = redis.call("SCARD", mine)
  if num_mine + num_more <= most then return true end
  if redis.call("SINTERCARD", 2, mine, open_key) == num_mine then return false end
  return redis.call("SINTERSTORE", mine, mine, open_key) + num_more <= most
end

-- An object whose name is in the trash is deleted by a janitor once it is due. The name is put there in the script that
-- takes away the last record of the object, so that none is ever forgotten in the store.
local function throw_away(name, due) redis.call("ZADD", trash_key, due, name) end

-- An upload that no job names goes when it is due, unless a batch pins it before.
local function set_unused(id, due) redis.call("ZADD", unused_key, due, id) end

local function discard_upload(id)
  local upload = load(upload_key(id), { "owner", "key", "sha256", "form_until" })
  if upload.key then
    -- While its form can be used, the object could come back.
    throw_away("uploads/" .. upload.key, math.max(now, tonumber(upload.form_until)))
  end
  if upload.sha256 then
    local digest = digest_key(upload.owner, upload.sha256)
    if redis.call("GET", digest) == id then redis.call("DEL", digest) end
  end
  redis.call("DEL", upload_key(id))
  redis.call("ZREM", unused_key, id)
end

local function release_upload(id)
  local upload = load(upload_key(id), { "references", "keep_until" })
  if not upload.references then return end
  if redis.call("HINCRBY", upload_key(id), "references", -1) <= 0 then
    set_unused(id, math.max(now, tonumber(upload.keep_until)))
  end
end

-- What a try has written that ends without a commit is nobody's. The worker deletes it, if it still can.
local function throw_away_try(job)
  local orphans_ms = redis.call("HGET", batch_key(job.batch_id), "orphans_ms")
  throw_away("outputs/" .. job.id .. "/" .. job.fence .. "/", now + tonumber(orphans_ms))
end

local function finish_batch_if_done(batch_id)
  local key = batch_key(batch_id)
  local batch = load(key, {
    "queued", "running", "status", "inputs_ms", "outputs_ms", "records_ms", "round", "webhook_url",
  })
  if tonumber(batch.queued) > 0 or tonumber(batch.running) > 0 then return end
  local expires = now + tonumber(batch.records_ms)
  set_batch_status(batch_id, batch.status, "finished")
  redis.call("HSET", key, "finished_at", now, "expires_at", expires)
  redis.call("ZADD", inputs_due_key, now + tonumber(batch.inputs_ms), batch_id)
  redis.call("ZADD", outputs_due_key, now + tonumber(batch.outputs_ms), batch_id)
  redis.call("ZADD", forget_key, expires, batch_id)
  if batch.webhook_url then
    redis.call("HSET", key, "webhook_since:" .. batch.round, now)
    redis.call("ZADD", webhooks_key, now, batch_id .. ":" .. batch.round)
  end
  tell(batch_id, "batch.finished", { batch_id = batch_id, round = tonumber(batch.round) })
end

-- The one way into `succeeded`, `failed` and `cancelled`.
local function settle(job, status)
  if job.status == "running" and status ~= "succeeded" then throw_away_try(job) end
  redis.call("HSET", job_key(job.id), "status", status, "finished_at", now, "on_device", 0, "cancel", 0)
  redis.call("ZREM", leases_key, job.id)
  redis.call("ZREM", delayed_key, job.id)
  redis.call("SREM", open_key, job.id)
  redis.call("SREM", owner_open_key(job.owner), job.id)
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
  throw_away_try(job)
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
