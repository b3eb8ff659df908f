"""Integrations with model libraries. Each one is imported by its own name, so that none is required."""
