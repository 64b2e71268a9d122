"""Claims about the engine: is the instrument right?

What the engine says is held against its definitions, recounted in other ways, and against inputs with known answers.
"""
