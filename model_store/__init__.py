"""Versions of predictors: what one is, where it lies, and how it is published without breaking a reader."""
