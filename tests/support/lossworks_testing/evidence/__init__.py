"""Honest checks: does a loss do on data what its paper says it does?

A study trains small models over seeds and returns a table; a slow test asserts the direction that the paper
claims, and ``python -m lossworks_testing.evidence`` writes all tables to docs/evidence-by-script.md.
"""
