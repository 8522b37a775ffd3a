-- LIST_BATCHES: a page of batches without their jobs, newest first.
-- ARGV: scope (an owner or "*"), shelf, label or "" for any, limit, order to go on behind or "", most batches to look at
-- Returns {order to go on behind or "", {batch fields (JSON), deliveries}...}
local label, limit, most_looks = ARGV[3], tonumber(ARGV[4]), tonumber(ARGV[6])
local found, num_looks = {}, 0
local last, has_more = walk_shelf(shelf_key(ARGV[1], ARGV[2]), ARGV[5] == "" and "+inf" or "(" .. ARGV[5], function(id)
  num_looks = num_looks + 1
  if label == "" or redis.call("HGET", batch_key(id), "label") == label then
    local _, fields = record(batch_key(id))
    found[#found + 1] = { fields, redis.call("LRANGE", deliveries_key(id), 0, -1) }
  end
  return #found == limit or num_looks == most_looks
end)
return { has_more and last or "", unpack(found) }
