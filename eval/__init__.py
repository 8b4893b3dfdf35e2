"""Acceptance rules and statistics, decoding runs, benchmarks, reports and plots."""
