"""The tables of README.md and the docs, each made from committed records."""
