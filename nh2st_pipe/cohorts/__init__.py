"""Predictions of many slides together: a table, a page, and means by patient."""
