"""Data formats (pool, artifacts, shards) and the array algorithms of curation."""
