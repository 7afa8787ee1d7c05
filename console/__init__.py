"""The `ksi` command, one file a sub-command."""
