"""Claims about attribution methods, as tests; installed as ``attribution.test_faithfulness``."""
