"""Faults in the decision."""
