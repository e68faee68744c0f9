"""Core of fusing a shared expert: checkpoint, evidence, decision, weights, forward and proof.

Knows torch in the files that compute; imports no engine.
"""
