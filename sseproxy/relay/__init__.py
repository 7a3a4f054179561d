"""The life of an exchange, from the request's head to its one outcome."""
