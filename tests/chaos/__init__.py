"""Faults at random against a whole llmwd: what is done (plan), how (stage)."""
