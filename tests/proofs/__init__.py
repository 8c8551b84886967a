"""Programs that measure what the agent promises and fail below the bound: `python -m tests.proofs.NAME`."""
