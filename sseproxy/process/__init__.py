"""The processes: the supervisor owns the sockets, and starts and ends the workers."""
