-- EXPIRE: uploads, photos, results and records whose time is over leave the ledger; their objects go to the trash.
-- Any number of processes may call it. ARGV: most entries of a kind a call. Returns a JSON object of counts
local limit = tonumber(ARGV[1])
local report = { uploads = 0, inputs = 0, outputs = 0, records = 0 }

local function each_due(key, name, act)
  for _, id in ipairs(redis.call("ZRANGEBYSCORE", key, "-inf", now, "LIMIT", 0, limit)) do
    if act(id) == false then return end
    report[name] = report[name] + 1
  end
end

-- Redis serves nobody else meanwhile, and batches differ in size: some jobs a call, but at least one batch of each kind.
local function within_budget(act)
  local jobs_left = 5 * limit
  return function(id)
    if jobs_left <= 0 then return false end
    jobs_left = jobs_left - redis.call("LLEN", batch_jobs_key(id))
    act(id)
  end
end

each_due(inputs_due_key, "inputs", within_budget(release_inputs))
each_due(outputs_due_key, "outputs", within_budget(throw_away_outputs))
each_due(forget_key, "records", within_budget(forget))
-- Last, so that what was released just now goes in the same call.
each_due(unused_key, "uploads", discard_upload)
return cjson.encode(report)
