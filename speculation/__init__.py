"""Running a version: ONNX Runtime session, state, ranking, coverage sets. Arrays in, arrays out."""

import os

# From 1.31 on, importing ONNX Runtime keeps a device id in the user's cache folder and reports to its maker.
# Nothing here asked for that, least of all in a user's MoE server. Whoever wants it sets the variable to 0.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
