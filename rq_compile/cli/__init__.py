"""The command line: one click command per module. No other package writes to the screen."""
