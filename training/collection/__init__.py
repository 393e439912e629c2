"""Records the routing of mixture-of-experts models of `transformers`, on given and on generated text."""
