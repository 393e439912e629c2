"""What `specmoe bench` measures: the model alone, and the service beside an endpoint that does nothing."""
