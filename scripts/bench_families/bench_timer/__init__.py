"""A family for benchmarks alone: its steps wait on a timer, as a lane waits for a device."""
