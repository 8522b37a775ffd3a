-- LIST_JOBS: a page of jobs across batches: the newest batch first, the jobs of a batch in their order.
-- ARGV: scope (an owner or "*"), shelf, status or "" for any, model or "" for any, limit, order of the batch to go on in or "",
-- number of its jobs that were shown, most jobs to look at
-- Returns {order of the batch to go on in or "", number of its jobs that were shown, job replies...}
local shelf, status, model, limit = shelf_key(ARGV[1], ARGV[2]), ARGV[3], ARGV[4], tonumber(ARGV[5])
local from, num_shown, most_looks = ARGV[6], tonumber(ARGV[7]), tonumber(ARGV[8])
local found, num_looks = {}, 0
local next_order, next_shown, is_last = "", 0, true

local function is_wanted(id)
  if status == "" and model == "" then return true end
  local job = redis.call("HMGET", job_key(id), "status", "model")
  return (status == "" or job[1] == status) and (model == "" or job[2] == model)
end

local _, has_more = walk_shelf(shelf, from == "" and "+inf" or from, function(id, order)
  local first = order == from and num_shown or 0
  local ids = redis.call("LRANGE", batch_jobs_key(id), first, -1)
  for i, job_id in ipairs(ids) do
    num_looks = num_looks + 1
    if is_wanted(job_id) then found[#found + 1] = job_reply(job_id) end
    if #found == limit or num_looks >= most_looks then
      next_order, next_shown, is_last = order, first + i, i == #ids
      return true
    end
  end
  return false
end)
if is_last and not has_more then next_order = "" end
return { next_order, next_shown, unpack(found) }
