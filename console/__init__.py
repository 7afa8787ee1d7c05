"""The `ksi` command, one file a sub-command.

`main` finds the sub-command and turns errors into words and exit codes, `options` is what all
sub-commands take, `show` how they print, `declared` what they know of the declarations, `facts`
what they know of a system without asking it.
"""
