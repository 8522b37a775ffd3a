-- TAKE_WEBHOOKS: deliveries that are due, each with its batch as it is now. Who takes one has a lease on it; then it is due
-- again. ARGV: most deliveries, lease in ms. Returns {round, attempt, due since (ms), batch as in READ_BATCH} for each
local replies = {}
for _, member in ipairs(redis.call("ZRANGEBYSCORE", webhooks_key, "-inf", now, "LIMIT", 0, ARGV[1])) do
  local batch_id, round = member:match("^(.*):(%d+)$")
  redis.call("ZADD", webhooks_key, now + tonumber(ARGV[2]), member)
  local attempt = redis.call("HINCRBY", batch_key(batch_id), "webhook_attempts:" .. round, 1)
  local since = redis.call("HGET", batch_key(batch_id), "webhook_since:" .. round)
  replies[#replies + 1] = { round, attempt, since, batch_reply(batch_id) }
end
return replies
