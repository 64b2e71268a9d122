"""Claims about attribution methods: is a method faithful?

One module for each file of `test_faithfulness`: the claims with their thresholds, controls and measurement.
"""
