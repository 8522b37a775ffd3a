-- READ_BATCH: a batch and its jobs in one round trip. ARGV: batch id. Returns `batch_reply`
return batch_reply(ARGV[1])
