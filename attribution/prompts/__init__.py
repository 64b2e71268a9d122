"""Prompts: facts, files of prompts, and their tokens.

What a prompt and its answer are, as text and as tokens. No model is loaded or run here. Next: `engine.questions` makes
a prompt ready for a model, `experiments.selection_rule` says which prompts a model knows.
"""
