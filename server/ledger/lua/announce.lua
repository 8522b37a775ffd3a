-- ANNOUNCE: what a worker says of itself. It is forgotten when the calls stop, and so are others who stopped.
-- ARGV: worker id, ms until it is forgotten, JSON {model: {version, sha256}} of weights that it found, JSON {model: is it
-- in memory, or about to be}, JSON [the models that it could run], field, value, ...
local MOST_LOOKED_AT = 8
local worker_id, forget_ms = ARGV[1], tonumber(ARGV[2])
redis.call("HSET", worker_key(worker_id), "announced_at", now, unpack(ARGV, 6))
redis.call("PEXPIRE", worker_key(worker_id), forget_ms)
redis.call("SADD", workers_key, worker_id)
redis.call("PEXPIRE", workers_key, forget_ms)
-- Outlives the worker: a job that is accepted while all workers are away is for these weights too.
for model, weights in pairs(cjson.decode(ARGV[3])) do
  redis.call("SET", weights_key(model), cjson.encode(weights), "PX", MODELS_KEPT_MS)
end
for model, holds in pairs(cjson.decode(ARGV[4])) do
  redis.call("ZREMRANGEBYSCORE", holders_key(model), "-inf", now)
  if holds then
    note_holder(model, worker_id, now + forget_ms)
  else
    redis.call("ZREM", holders_key(model), worker_id)
  end
end
for _, model in ipairs(cjson.decode(ARGV[5])) do note_served(model) end
-- A few at random each time: to look at all of them in every call would take a large fleet's calls with it.
for _, id in ipairs(redis.call("SRANDMEMBER", workers_key, MOST_LOOKED_AT)) do
  if redis.call("EXISTS", worker_key(id)) == 0 then redis.call("SREM", workers_key, id) end
end
