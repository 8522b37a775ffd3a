-- SWEEP: what is due and nothing else: expired leases, jobs whose back-off is over, silent bells.
-- Any number of processes may call it.
-- ARGV: lease in ms, pause between sweeps that looks like an outage in ms, most entries a call, device deaths that poison,
-- models... Returns a JSON object of counts
local lease_ms, outage_ms, limit, poison_after = tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3]), tonumber(ARGV[4])
local report = { requeued = 0, cancelled = 0, poisoned = 0, due = 0, rung = 0, waiting = false }

-- Nobody could renew while Redis was away, and while nobody swept it may have been. Give every holder one lease time
-- to renew before its job is taken from it.
local swept_key = prefix .. ":swept"
local swept = load(swept_key, { "at", "grace_until" })
local grace_until = tonumber(swept.grace_until or 0)
if not swept.at or now - tonumber(swept.at) > outage_ms then grace_until = now + lease_ms end
redis.call("HSET", swept_key, "at", now, "grace_until", grace_until)
redis.call("PEXPIRE", swept_key, math.max(60000, 4 * lease_ms))

local function take_back(job)
  if job.cancel == "1" then
    settle_cancelled(job)
    report.cancelled = report.cancelled + 1
    return
  end
  redis.call("HINCRBY", job_key(job.id), "deaths", 1)
  if job.on_device == "1" then
    local device_deaths = redis.call("HINCRBY", job_key(job.id), "device_deaths", 1)
    redis.call("HSET", job_key(job.id), "suspect", 1)
    if device_deaths >= poison_after then
      settle_failed(job, "poisoned", "The worker died " .. device_deaths .. " times while this job was on its device.")
      report.poisoned = report.poisoned + 1
      return
    end
  end
  requeue(job, 0)
  report.requeued = report.requeued + 1
end

if now < grace_until then
  report.waiting = redis.call("ZCOUNT", leases_key, "-inf", now) > 0
else
  for _, id in ipairs(redis.call("ZRANGEBYSCORE", leases_key, "-inf", now, "LIMIT", 0, limit)) do
    take_back(load_job(id))
  end
end

for _, id in ipairs(redis.call("ZRANGEBYSCORE", delayed_key, "-inf", now, "LIMIT", 0, limit)) do
  redis.call("ZREM", delayed_key, id)
  local job = load_job(id)
  make_ready(job)
  ring(job.model)
  report.due = report.due + 1
end

-- A bell can be lost (a worker died with it, a flushed queue). Where jobs are ready and no bell waits, ring again.
for i = 5, #ARGV do
  local model = ARGV[i]
  if redis.call("LLEN", dramatiq .. ":" .. prefix .. "." .. model) == 0 then
    for _, priority in ipairs(PRIORITIES) do
      if redis.call("EXISTS", turns_key(model, priority)) == 1 then
        ring(model)
        report.rung = report.rung + 1
        break
      end
    end
  end
end

return cjson.encode(report)
