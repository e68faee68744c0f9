"""What fusing a shared expert means: evidence, policy, decision, layout, remap, routing, audit.

Knows torch in the files that compute; knows no engine by name.
"""
