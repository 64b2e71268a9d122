"""Identities: what a loaded model is held to before any of its numbers is believed.

`preflight` runs all of them, `edits` has those that edit the model. An identity holds up to a rounding bound, whatever
the model knows. (The room cannot be named `preflight`: that name is the verb `attribution.preflight`.)
"""
