"""Data of incubation: from shards, folders or prompts, encoded once and read from a cache."""
