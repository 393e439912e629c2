"""The front door: the `specmoe` command."""
