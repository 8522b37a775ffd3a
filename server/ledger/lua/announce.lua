-- ANNOUNCE: what a worker says of itself. It is forgotten when the calls stop, and so are others who stopped.
-- ARGV: worker id, ms until it is forgotten, field, value, ...
local forget_ms = ARGV[2]
redis.call("HSET", worker_key(ARGV[1]), unpack(ARGV, 3))
redis.call("PEXPIRE", worker_key(ARGV[1]), forget_ms)
redis.call("SADD", workers_key, ARGV[1])
redis.call("PEXPIRE", workers_key, forget_ms)
for _, id in ipairs(redis.call("SMEMBERS", workers_key)) do
  if redis.call("EXISTS", worker_key(id)) == 0 then redis.call("SREM", workers_key, id) end
end
