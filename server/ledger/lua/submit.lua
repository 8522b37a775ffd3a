-- SUBMIT: a batch, its jobs, the pins on its uploads, the idempotency record and the bells: all or nothing.
-- ARGV[1]: JSON {batch: {id, owner, fields}, jobs: [{id, version, fields,
-- uploads: [[id, etag]]}], max_open, max_owner_open?, admission?: {max_memory_fraction, grace_ms}, idempotency?}
-- Returns {kind, text}: accepted | replayed (text: the first answer) | conflict | missing_upload (text: its id) | full |
-- owner_full | no_memory (text: percent in use) | unserved (text: a model that no worker has been ready for since the
-- grace)
local request = cjson.decode(ARGV[1])
local batch, jobs, idempotency = request.batch, request.jobs, request.idempotency
local admission = request.admission

local idempotency_key
if idempotency ~= cjson.null and idempotency then
  idempotency_key = prefix .. ":idempotency:" .. batch.owner .. ":" .. idempotency.key
  local first = load(idempotency_key, { "body_sha256", "answer", "batch_id" })
  if first.batch_id == batch.id then return { "accepted", "" } end
  if first.batch_id and first.body_sha256 ~= idempotency.body_sha256 then return { "conflict", "" } end
  if first.batch_id then return { "replayed", first.answer } end
end
-- The caller drew the id before the call, so a call repeated after a lost reply finds its own work.
if redis.call("EXISTS", batch_key(batch.id)) == 1 then return { "accepted", "" } end
if redis.call("SCARD", open_key) + #jobs > request.max_open then return { "full", "" } end
if request.max_owner_open and not has_room(batch.owner, #jobs, request.max_owner_open) then return { "owner_full", "" } end

-- As Redis itself counts it before it refuses to write; 0 where it has no bound, or does not tell.
local function memory_in_use()
  local info = redis.pcall("INFO", "memory")
  if type(info) ~= "string" then return 0 end
  local function figure(name) return tonumber(info:match("\n" .. name .. ":(%d+)")) or 0 end
  local most = figure("maxmemory")
  return most > 0 and (figure("used_memory") - figure("mem_not_counted_for_evict")) / most or 0
end
-- What drains the queue needs memory too: Dramatiq's own scripts stop where Redis is full.
local in_use = admission and memory_in_use()
if in_use and in_use > admission.max_memory_fraction then return { "no_memory", digits(in_use * 100) } end

local uploads, named = {}, {}
for _, job in ipairs(jobs) do
  for _, pin in ipairs(job.uploads) do
    local id, etag = pin[1], pin[2]
    if not uploads[id] then
      uploads[id] = load(upload_key(id), { "owner", "references", "sha256" })
      if uploads[id].owner ~= batch.owner then return { "missing_upload", id } end
      named[#named + 1] = id
    end
    uploads[id].etag = etag
    uploads[id].references = uploads[id].references + 1
  end
end

-- Jobs of a model that nobody has been ready for would wait, and nobody could say for how long.
local is_known = {}
for _, job in ipairs(admission and jobs or {}) do
  local model = job.fields.model
  if is_known[model] == nil then
    local served_at = tonumber(redis.call("GET", served_key(model)))
    is_known[model] = served_at ~= nil
    if served_at and now - served_at > admission.grace_ms then return { "unserved", model } end
  end
end
for model, known in pairs(is_known) do
  if not known then note_served(model) end
end

local function put(key, fields, ...)
  local flat = { ... }
  local n = #flat
  for name, value in pairs(fields) do
    flat[n + 1], flat[n + 2] = name, value
    n = n + 2
  end
  redis.call("HSET", key, unpack(flat))
end

-- Batches are listed by this number: by age, and no two have the same.
local last = redis.call("ZREVRANGE", shelf_key(EVERYBODY, "all"), 0, 0, "WITHSCORES")
batch.order = digits(math.max(now_micros, (tonumber(last[2]) or 0) + 1))
put(batch_key(batch.id), batch.fields, "id", batch.id, "owner", batch.owner, "order", batch.order, "status", "queued",
  "created_at", now, "round", 1, "total", #jobs, "queued", #jobs, "running", 0, "succeeded", 0, "failed", 0,
  "cancelled", 0)
for _, shelf in ipairs({ "all", "queued", "has-queued" }) do put_on_shelf(batch, shelf) end

-- From now on the photos are the batch's too. Their bytes are known, so that the same ones need not be sent again.
for _, id in ipairs(named) do
  local upload = uploads[id]
  redis.call("HSET", upload_key(id), "references", upload.references, "etag", upload.etag)
  if upload.sha256 then redis.call("SET", digest_key(batch.owner, upload.sha256), id, "NX") end
end
if #named > 0 then redis.call("ZREM", unused_key, unpack(named)) end

-- The weights that workers have of this version now: should they be others when the job runs, that must be seen.
local seen = {}
local function weights_of(model, version)
  if seen[model] == nil then
    redis.call("SADD", models_key, model)
    redis.call("PEXPIRE", models_key, MODELS_KEPT_MS)
    seen[model] = redis.call("GET", weights_key(model)) or false
    seen[model] = seen[model] and cjson.decode(seen[model])
  end
  return seen[model] and seen[model].version == version and seen[model].sha256 or nil
end

-- What many jobs share is written once for all of them.
local ids, lines, models, num_bells, has_high = {}, {}, {}, {}, false
for i, job in ipairs(jobs) do
  local order = digits(now_micros + i)
  job.fields.weights_sha256 = weights_of(job.fields.model, job.version)
  put(job_key(job.id), job.fields, "id", job.id, "batch_id", batch.id, "owner", batch.owner, "status", "queued",
    "created_at", now, "queued_at", now, "order", order, "fence", 0, "attempts", 0, "errors", 0, "deaths", 0,
    "device_deaths", 0, "suspect", 0, "on_device", 0, "cancel", 0)
  ids[i] = job.id
  local model, priority = job.fields.model, job.fields.priority
  local line = turns_key(model, priority)
  lines[line] = lines[line] or { ready = ready_key(model, priority, batch.owner), members = {} }
  local members = lines[line].members
  members[#members + 1] = order
  members[#members + 1] = job.id
  if not num_bells[model] then models[#models + 1] = model end
  num_bells[model] = (num_bells[model] or 0) + 1
  has_high = has_high or priority == "high"
end
redis.call("RPUSH", batch_jobs_key(batch.id), unpack(ids))
note_open(batch.owner, unpack(ids))
for turns, line in pairs(lines) do
  redis.call("ZADD", line.ready, unpack(line.members))
  take_turn(turns, batch.owner)
end
-- Each worker that hears a bell claims until nothing is ready: a bell more than there are workers would find nobody.
local num_workers = math.max(1, redis.call("SCARD", workers_key))
for _, model in ipairs(models) do ring(model, math.min(num_bells[model], num_workers)) end
tell_workers_ready(has_high, models)

if idempotency_key then
  redis.call("HSET", idempotency_key, "batch_id", batch.id, "body_sha256", idempotency.body_sha256,
    "answer", idempotency.answer)
  redis.call("PEXPIRE", idempotency_key, idempotency.ttl_ms)
end
announce_change(batch.id)
return { "accepted", "" }
