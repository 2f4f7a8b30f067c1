"""Many callers, one model."""
