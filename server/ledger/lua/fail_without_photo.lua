-- FAIL_WITHOUT_PHOTO: a queued job whose photo is not in the store can only fail; it does so before it costs a worker
-- anything. ARGV: job id, fence, upload id. Returns failed | moved (it is not queued as it was)
local job = load_job(ARGV[1])
if job.status ~= "queued" or job.fence ~= ARGV[2] then return "moved" end
remove_ready(job)
settle_failed(job, "input_missing", "The photo " .. ARGV[3] .. " is not in the store any more.")
return "failed"
