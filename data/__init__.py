"""Prompts, templates and masks, regeneration, the activation store, and the loader."""
