"""Sweeps: many trainings of one config, each with other values, proposed and stopped early by Optuna."""
