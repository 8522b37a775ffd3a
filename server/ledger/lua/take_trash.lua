-- TAKE_TRASH: names of objects that are to be deleted now. Who takes them has some time; then they are given out again.
-- ARGV: most names, time in ms. Returns the names
local names = redis.call("ZRANGEBYSCORE", trash_key, "-inf", now, "LIMIT", 0, ARGV[1])
for _, name in ipairs(names) do redis.call("ZADD", trash_key, now + tonumber(ARGV[2]), name) end
return names
