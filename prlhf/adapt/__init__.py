"""Users who come and go after training."""
