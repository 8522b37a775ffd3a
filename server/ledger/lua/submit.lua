-- SUBMIT: a batch, its jobs, the pins on its uploads, the idempotency record and the bells: all or nothing.
-- ARGV[1]: JSON {batch: {id, owner, fields}, jobs: [{id, fields, uploads}], max_open, idempotency?}
-- Returns {kind, text}: accepted | replayed (text: the first answer) | conflict | missing_upload (text: its id) | full
local request = cjson.decode(ARGV[1])
local batch, jobs, idempotency = request.batch, request.jobs, request.idempotency

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
for _, job in ipairs(jobs) do
  for _, upload_id in ipairs(job.uploads) do
    if redis.call("HGET", upload_key(upload_id), "owner") ~= batch.owner then return { "missing_upload", upload_id } end
  end
end

local function put(key, fields)
  local flat = {}
  for name, value in pairs(fields) do
    flat[#flat + 1] = name
    flat[#flat + 1] = value
  end
  redis.call("HSET", key, unpack(flat))
end

put(batch_key(batch.id), batch.fields)
redis.call("HSET", batch_key(batch.id), "id", batch.id, "owner", batch.owner, "status", "queued", "created_at", now,
  "round", 1, "total", #jobs, "queued", #jobs, "running", 0, "succeeded", 0, "failed", 0, "cancelled", 0)

for i, job in ipairs(jobs) do
  local key = job_key(job.id)
  local order = digits(now_micros + i)
  put(key, job.fields)
  redis.call("HSET", key, "id", job.id, "batch_id", batch.id, "owner", batch.owner, "status", "queued",
    "created_at", now, "queued_at", now, "order", order, "fence", 0, "attempts", 0, "errors", 0, "deaths", 0,
    "device_deaths", 0, "suspect", 0, "on_device", 0, "cancel", 0)
  redis.call("RPUSH", batch_jobs_key(batch.id), job.id)
  redis.call("SADD", open_key, job.id)
  for _, upload_id in ipairs(job.uploads) do
    redis.call("HINCRBY", upload_key(upload_id), "references", 1)
    redis.call("PERSIST", upload_key(upload_id))
  end
  make_ready({
    id = job.id, owner = batch.owner, order = order, model = job.fields.model, priority = job.fields.priority,
  })
  ring(job.fields.model)
end

if idempotency_key then
  redis.call("HSET", idempotency_key, "batch_id", batch.id, "body_sha256", idempotency.body_sha256,
    "answer", idempotency.answer)
  redis.call("PEXPIRE", idempotency_key, idempotency.ttl_ms)
end
announce_change(batch.id)
return { "accepted", "" }
