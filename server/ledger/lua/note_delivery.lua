-- NOTE_DELIVERY: how an attempt to deliver a webhook ended; logged in the batch.
-- ARGV: batch id, round, delivery (JSON), delay in ms until the next attempt or "" for none
local batch_id, member = ARGV[1], ARGV[1] .. ":" .. ARGV[2]
if redis.call("EXISTS", batch_key(batch_id)) == 0 then return end
local delivery = cjson.decode(ARGV[3])
delivery.at_ms = now
redis.call("RPUSH", deliveries_key(batch_id), cjson.encode(delivery))
redis.call("LTRIM", deliveries_key(batch_id), -50, -1)
if ARGV[4] == "" then
  redis.call("ZREM", webhooks_key, member)
else
  -- Another sender may have brought it to an end meanwhile.
  redis.call("ZADD", webhooks_key, "XX", now + tonumber(ARGV[4]), member)
end
