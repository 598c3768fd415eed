"""Shards to weights: crops, losses, schedules, the loader and the trainer."""
