"""What `rc-agents demo` runs, and the recipe that made the specialists it shows."""
