-- Part of the scripts that read: records as they are sent to clients.

local function as_map(flat)
  local map = {}
  for i = 1, #flat, 2 do map[flat[i]] = flat[i + 1] end
  return map
end

-- A record is sent as one JSON text: a client reads one long string much faster than sixty short ones.
local function record(key)
  local map = as_map(redis.call("HGETALL", key))
  return map, cjson.encode(map)
end

-- {job fields (JSON), queue position or ""}
local function job_reply(id)
  local job, fields = record(job_key(id))
  local rank = job.status == "queued" and redis.call("ZRANK", ready_key(job.model, job.priority, job.owner), id)
  return { fields, rank and rank + 1 or "" }, job, rank
end

local function last_event(batch_id)
  local last = redis.call("XREVRANGE", events_key(batch_id), "+", "-", "COUNT", 1)
  return last[1] and last[1][1] or "0-0"
end

local live_workers
local function num_workers(model)
  if not live_workers then
    live_workers = {}
    for _, id in ipairs(redis.call("SMEMBERS", workers_key)) do
      local models = redis.call("HGET", worker_key(id), "models")
      if models then live_workers[#live_workers + 1] = cjson.decode(models) end
    end
  end
  local count = 0
  for _, models in ipairs(live_workers) do
    if models[model] and models[model].ready then count = count + 1 end
  end
  return count
end

-- How many jobs will be claimed before a job at `rank` (from 0) of its owner's line: all of a higher priority, the owner's own,
-- and of each other owner as many as it has turns until then. Owners who stand before this one have a turn more.
local function num_ahead(model, priority, owner, rank)
  local ahead = rank
  for _, higher in ipairs(PRIORITIES) do
    local num_turns = rank + 1
    for _, other in ipairs(redis.call("ZRANGE", turns_key(model, higher), 0, -1)) do
      local num_ready = redis.call("ZCARD", ready_key(model, higher, other))
      if higher ~= priority then
        ahead = ahead + num_ready
      elseif other == owner then
        num_turns = rank
      else
        ahead = ahead + math.min(num_ready, num_turns)
      end
    end
    if higher == priority then return ahead end
  end
end

-- What an estimate of a batch's end needs, by model: {jobs ahead of its last one, live workers, measured speeds}
local function load_reply(last_ranks, jobs)
  local loads = {}
  for _, job in ipairs(jobs) do
    if not loads[job.model] and (job.status == "queued" or job.status == "running") then
      local rank = last_ranks[job.model]
      loads[job.model] = {
        rank and num_ahead(job.model, job.priority, job.owner, rank) or 0,
        num_workers(job.model),
        as_map(redis.call("HGETALL", speed_key(job.model))),
      }
    end
  end
  return cjson.encode(loads)
end

-- {} when unknown, else {batch fields (JSON), deliveries, id of the last event, loads (JSON), job replies...}
local function batch_reply(id)
  local batch, fields = record(batch_key(id))
  if not batch.id then return {} end
  local replies, jobs, last_ranks = {}, {}, {}
  for i, job_id in ipairs(redis.call("LRANGE", batch_jobs_key(id), 0, -1)) do
    local job, rank
    replies[i], job, rank = job_reply(job_id)
    jobs[i] = job
    if rank then last_ranks[job.model] = math.max(rank, last_ranks[job.model] or 0) end
  end
  local deliveries = redis.call("LRANGE", deliveries_key(id), 0, -1)
  return { fields, deliveries, last_event(id), load_reply(last_ranks, jobs), unpack(replies) }
end

-- From the newest to the oldest batch of a shelf, `act` on each; it returns true where the list must stop.
-- Returns the number under which the last one stood, and whether there are more.
local function walk_shelf(shelf, from, act)
  local highest, last = from, nil
  while true do
    local entries = redis.call("ZREVRANGEBYSCORE", shelf, highest, "-inf", "WITHSCORES", "LIMIT", 0, 50)
    for i = 1, #entries, 2 do
      last = entries[i + 1]
      if act(entries[i], last) then
        return last, redis.call("ZCOUNT", shelf, "-inf", "(" .. last) > 0
      end
    end
    if #entries < 100 then return last, false end
    highest = "(" .. last
  end
end
