-- LOST_UPLOAD: the object of an upload is not in the store any more, so its bytes are not offered again.
-- ARGV: owner, upload id
local sha256 = redis.call("HGET", upload_key(ARGV[2]), "sha256")
if not sha256 then return end
local digest = digest_key(ARGV[1], sha256)
if redis.call("GET", digest) == ARGV[2] then redis.call("DEL", digest) end
