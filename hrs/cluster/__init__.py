"""Studies on machines: what to run, where it fits, how one trial goes from tokens to a tracked, audited result."""
