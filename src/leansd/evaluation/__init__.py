"""Measurements: comparisons on the same seeds, scores of sets, profiles, benchmarks, records."""
