"""Supervisor and workers: who owns which socket, who starts and ends whom."""
