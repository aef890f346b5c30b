"""Pictures by the ten thousand: rows of prompts in, shards out, on one machine or many."""
