"""A testbed for LLM serving: one engine, whose allocators, schedulers and executors are swapped by name."""
