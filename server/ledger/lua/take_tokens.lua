-- TAKE_TOKENS: takes from a bucket that fills by itself; nothing is kept of a full one, which is as good as none.
-- ARGV: name of the bucket, most tokens that it holds, tokens that come each second, tokens to take (at most what it holds)
-- Returns 0 where they were taken, else in how many ms there will be enough
local key = tokens_key(ARGV[1])
local capacity, per_second, amount = tonumber(ARGV[2]), tonumber(ARGV[3]), tonumber(ARGV[4])
local bucket = load(key, { "left", "at" })
local at = tonumber(bucket.at) or now_micros
-- Where the clock was set back, the bucket goes on filling from here.
if at > now_micros then redis.call("HSET", key, "at", digits(now_micros)) end
local seconds = math.max(0, now_micros - at) / 1000000
local left = math.min(capacity, (tonumber(bucket.left) or capacity) + seconds * per_second)
local missing = amount - left
-- What is refused writes nothing, however often it comes.
if missing > 0 then return math.ceil(missing / per_second * 1000) end
left = left - amount
redis.call("HSET", key, "left", string.format("%.6f", left), "at", digits(now_micros))
redis.call("PEXPIRE", key, digits(math.ceil((capacity - left) / per_second * 1000) + 1))
return 0
