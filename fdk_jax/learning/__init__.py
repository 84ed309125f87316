"""What fits a format to a network: statistics, calibration, training, evaluation."""
