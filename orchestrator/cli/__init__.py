"""The commands of the program `dab`, one module a group; `cli.py` at the root assembles them."""
