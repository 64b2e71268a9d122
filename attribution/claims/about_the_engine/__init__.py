"""What is measured for claims about the engine: is the instrument right?

`test_faithfulness/test_definitions.py` and `test_decomposition.py` state the claims. Here the engine's numbers are
compared with its definitions, recounted in other ways, and with inputs whose answers are known.
"""
