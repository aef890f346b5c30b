"""The conformance suite: pipelines, samplers and plans against brute force."""
