"""Predictions as files of other programs: one module a target, all on one view of a prediction."""
