"""One module a subcommand, imported only when it runs: `add_arguments(parser)` and `run(args) -> int`."""
