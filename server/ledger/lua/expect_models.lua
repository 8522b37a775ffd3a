-- EXPECT_MODELS: an API process starts. Workers get time to bring a model of which nothing is known yet, and every model
-- where no API was there lately: then the workers may have been away too, and are starting with it.
-- ARGV: the models of its registry.
local was_there = redis.call("EXISTS", prefix .. ":swept") == 1
for _, model in ipairs(ARGV) do
  if was_there then note_served(model, "NX") else note_served(model) end
end
