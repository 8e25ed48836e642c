"""Driver of a run: everything that surrounds the chain, from the lease to the notifications."""
