"""Claims about the authors' notebooks: does the engine compute what they printed?

`printed` reads what they printed, `recount` computes it, `tolerance` says how far the two may differ.
"""
