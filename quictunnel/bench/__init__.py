"""The bench: what a tunnel does in a second, how long a request takes, and what limits it, told by measurement."""
