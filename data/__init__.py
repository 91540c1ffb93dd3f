"""Tokens: shards, corpora, tokenizers, sources, their order and batches, and the referee; data/run is what a run leaves."""
