-- EXPECT_MODELS: an API process starts. Workers get time to bring a model of which nothing is known yet.
-- ARGV: the models of its registry.
for _, model in ipairs(ARGV) do note_served(model, "NX") end
