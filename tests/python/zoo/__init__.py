"""Models of every kind, built small and offline, and what each must pass."""
