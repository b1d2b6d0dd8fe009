"""Synthetic hands and objects with exact truth: the generator, its looks, clips, shards and corruptions."""
