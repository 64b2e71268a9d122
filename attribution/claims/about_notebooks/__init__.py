"""What is measured for claims about the authors' notebooks: does the engine compute what they printed?

`test_knowledge/test_published.py` states the claims. Here `printed` reads what they printed, `recount` computes it, and
`tolerance` says how far the two may differ.
"""
