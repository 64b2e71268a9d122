"""The pytest plugin: options, chosen models, fixtures, and what is gathered while tests run.

`attribution.plugin` is its public address, and `outcome` alone decides why a run is red. torch and nnsight are imported
inside fixtures, so that a test run that uses none of them pays nothing.
"""
