-- READ_EVENTS: what happened in a batch after an event, and how far its running jobs are.
-- ARGV: batch id, id of the event or "" for none, most events
-- Returns {} when the batch is unknown, else {status, 1 if the event is known, its events behind it..., progress (JSON)...}
local status = redis.call("HGET", batch_key(ARGV[1]), "status")
if not status then return {} end
local stream, after = events_key(ARGV[1]), ARGV[2]

local function is_known()
  if after == "" then return false end
  if after ~= "0-0" then return #redis.call("XRANGE", stream, after, after) > 0 end
  -- The beginning is known as long as nothing was cut off there.
  if redis.call("EXISTS", stream) == 0 then return true end
  local info = redis.call("XINFO", "STREAM", stream)
  local counts = {}
  for i = 1, #info, 2 do counts[info[i]] = info[i + 1] end
  return counts["entries-added"] == counts["length"]
end

if not is_known() then return { status, 0, {}, "[]" } end
local progress = {}
if status == "running" then
  for _, id in ipairs(redis.call("LRANGE", batch_jobs_key(ARGV[1]), 0, -1)) do
    local job = load(job_key(id), { "status", "index", "step", "total_steps", "attempts" })
    if job.status == "running" and job.step then
      progress[#progress + 1] = { id, tonumber(job.index), tonumber(job.step), tonumber(job.total_steps), tonumber(job.attempts) }
    end
  end
end
return { status, 1, redis.call("XRANGE", stream, "(" .. after, "+", "COUNT", ARGV[3]), #progress > 0 and cjson.encode(progress) or "[]" }
