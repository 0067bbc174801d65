"""The built-in corpus, a model for it and a reward."""
