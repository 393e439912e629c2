"""Running a version: ONNX Runtime session, state, ranking, coverage sets. Arrays in, arrays out."""
