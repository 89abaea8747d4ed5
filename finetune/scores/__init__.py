"""Scores of predictions, calibration of probabilities, and tests of differences."""
