"""Tiny random checkpoints for tests: recipes, weights, layouts, permutations, headers only."""
