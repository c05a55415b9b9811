"""What stage two learns from: targets, panels, folds, samples."""
