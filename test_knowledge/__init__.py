"""Claims about models, as tests; installed as ``attribution.test_knowledge``."""
