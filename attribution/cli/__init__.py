"""The command line: ``python -m attribution COMMAND``.

One module for each command; each adds its arguments to the parser and runs itself.
"""
