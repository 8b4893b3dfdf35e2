"""The headstart command: arguments in, one call out."""
