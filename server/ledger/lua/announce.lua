-- ANNOUNCE: what a worker says of itself. It is forgotten when the calls stop, and so are others who stopped.
-- ARGV: worker id, ms until it is forgotten, JSON {model: {version, sha256}} of weights that it found, field, value, ...
local forget_ms = ARGV[2]
redis.call("HSET", worker_key(ARGV[1]), unpack(ARGV, 4))
redis.call("PEXPIRE", worker_key(ARGV[1]), forget_ms)
redis.call("SADD", workers_key, ARGV[1])
redis.call("PEXPIRE", workers_key, forget_ms)
-- Outlives the worker: a job that is accepted while all workers are away is for these weights too.
for model, weights in pairs(cjson.decode(ARGV[3])) do
  redis.call("SET", weights_key(model), cjson.encode(weights), "PX", MODELS_KEPT_MS)
end
for _, id in ipairs(redis.call("SMEMBERS", workers_key)) do
  if redis.call("EXISTS", worker_key(id)) == 0 then redis.call("SREM", workers_key, id) end
end
