"""The prediction service: a thin FastAPI shell around `speculation`."""
