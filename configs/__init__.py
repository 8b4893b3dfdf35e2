"""Typed, frozen and strict run configuration, its loader, and one YAML file per recipe."""
