"""The engine: from one trace to scores, rankings, ablations and query scores.

Pure functions on tensors between `trace`, which reads activations, and `ranking`, `ablation` and `queries`, the verbs.
One equation, one place: Eq. 13 is `importance.log_prob_increase`. No claims, no thresholds. Next: `experiments`.
"""
