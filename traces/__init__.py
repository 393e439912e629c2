"""Recorded routing: what a mixture-of-experts model routed each token to, checked and on disk."""
