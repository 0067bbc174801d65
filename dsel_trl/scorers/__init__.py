"""Models that measure: embeddings, language models, rewards."""
