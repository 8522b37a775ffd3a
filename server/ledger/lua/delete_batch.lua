-- DELETE_BATCH: a finished batch goes at once, as if its time were over.
-- ARGV: token, owner ("" for any), batch id. Returns deleted | open | unknown
local earlier = earlier_reply(ARGV[1])
if earlier then return earlier end
local batch = load(batch_key(ARGV[3]), { "owner", "status" })
if not batch.status or (ARGV[2] ~= "" and batch.owner ~= ARGV[2]) then return "unknown" end
if batch.status ~= "finished" then return "open" end
forget(ARGV[3])
return keep_reply(ARGV[1], "deleted")
