"""The life of an exchange, from the request head to its one outcome."""
