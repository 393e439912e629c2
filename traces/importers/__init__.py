"""Readers of other systems' recordings, each handing on a checked RoutingTrace."""
