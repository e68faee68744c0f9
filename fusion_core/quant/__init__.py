"""Quantisation: one file and one record a method, what its configs say of single modules, nothing judged."""
