"""Integrations with model libraries, each imported by its own name: none is required."""
