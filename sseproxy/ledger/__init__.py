"""Counts that all workers of a machine share."""
