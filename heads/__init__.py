"""Targets, draft heads, ordered embeddings, candidate generators, and export."""
