"""What is measured for claims about attribution methods: is a method faithful?

The files of `test_faithfulness` state the claims; each has a module of the same name here.
"""
