-- ANNOUNCE_UPLOADS: photos that will come, in one call. Where the owner's store has the same bytes already, that upload is
-- offered instead: it was looked at (it has an ETag), and its form can no longer be used to change it. Not for ever: the
-- store's own lifecycle, which counts from the day of writing, must never come first.
-- ARGV[1]: JSON {owner, form_ttl_ms, unused_ttl_ms, offer_ms, uploads: [{id, fields}]}. Returns the id to use for each
local request = cjson.decode(ARGV[1])
local unused_until = now + request.unused_ttl_ms

local function find_same(fields)
  if not fields.sha256 then return nil end
  local digest = digest_key(request.owner, fields.sha256)
  local id = redis.call("GET", digest)
  if not id then return nil end
  local found = load(upload_key(id), { "etag", "size_bytes", "content_type", "form_until" })
  local is_same = found.etag and found.size_bytes == fields.size_bytes and found.content_type == fields.content_type
  if not is_same then return nil end
  local form_until = tonumber(found.form_until)
  if form_until <= now - request.offer_ms then
    -- Makes room for a younger upload of the same bytes.
    redis.call("DEL", digest)
    return nil
  end
  return form_until <= now and id or nil
end

local replies = {}
for _, upload in ipairs(request.uploads) do
  local id = find_same(upload.fields)
  if id then
    local keep_until = math.max(unused_until, tonumber(redis.call("HGET", upload_key(id), "keep_until")))
    redis.call("HSET", upload_key(id), "keep_until", keep_until)
    redis.call("ZADD", unused_key, "XX", "GT", keep_until, id)
  else
    id = upload.id
    local form_until = now + request.form_ttl_ms
    local flat = { "id", id, "owner", request.owner, "references", 0, "form_until", form_until, "keep_until", form_until }
    for name, value in pairs(upload.fields) do
      flat[#flat + 1] = name
      flat[#flat + 1] = value
    end
    redis.call("HSET", upload_key(id), unpack(flat))
    set_unused(id, unused_until)
  end
  replies[#replies + 1] = id
end
return replies
