"""Progressive incubation: distil, assemble, distil again (A-SDM, arXiv 2406.00210)."""
