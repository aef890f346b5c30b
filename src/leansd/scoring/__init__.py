"""Sets of pictures and how good they are: features out of shards, here or on Ray, and metrics."""
