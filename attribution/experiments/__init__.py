"""Experiments: what is asked of a model with the engine, prompt by prompt.

Evaluation by ablation, the selection rule, controls, edited copies of a model, and one prompt explained. Measures; does
not judge. Next: `claims` judges what is measured here.
"""
