-- DISCARD_STRAY: an object that no record names goes to the trash.
-- ARGV: kind (upload, try or marker), its name in the trash, upload or job id, fence of the try or "", due in ms from now.
-- Returns thrown | named (a record names it by now)
local kind, name, id = ARGV[1], ARGV[2], ARGV[3]

local function is_named()
  if kind == "upload" then return redis.call("EXISTS", upload_key(id)) == 1 end
  local job = load(job_key(id), { "status", "fence", "output" })
  if not job.status then return false end
  if kind == "marker" then return job.status ~= "succeeded" or job.output end
  if job.status == "running" and job.fence == ARGV[4] then return true end
  -- After the ledger was set back this fence will be handed out again, and its worker writes to the very same key.
  if job.status ~= "succeeded" and tonumber(ARGV[4]) > tonumber(job.fence) then return true end
  return job.output and "outputs/" .. cjson.decode(job.output).key == name
end

if is_named() then return "named" end
throw_away(name, now + tonumber(ARGV[5]))
return "thrown"
