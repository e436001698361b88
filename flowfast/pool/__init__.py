"""One budget for many prompts: what an easy one does not need goes to those that do (rollover across prompts)."""
