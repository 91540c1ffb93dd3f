"""Data pipeline: shards, corpora, tokenizers, sources, orders, batches and evaluation; data/run writes a run's files."""
