"""Define the command `intaglio` and the commands of the core.

Other packages add commands by entry points of the group `intaglio.commands`. Every option of a pass is set in the
recipe or with `--set`; no option exists in the command line alone.
"""
