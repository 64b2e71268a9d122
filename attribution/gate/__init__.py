"""The gate: stored runs, and what a run is worse at than a stored one.

`stored_run` is the record and its format, `storage` the files, `comparison` the statistics. No pytest here. Next:
`pytest_plugin`, which decides from a comparison whether a run is red.
"""
