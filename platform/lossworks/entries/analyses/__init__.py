"""Analyses: figures and pictures of something trained."""
