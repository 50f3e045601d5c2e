"""What fits a model's gates: calibration in closed form, and training."""
