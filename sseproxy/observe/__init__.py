"""What an operator sees: metrics, the access log, the log."""
